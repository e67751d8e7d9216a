"""What the controller exports: pools, signals and decisions, as they stand; and the targets."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.config import parse_config
from cluster.controller_metrics import ControllerMetrics
from cluster.metrics import REGISTRIES
from cluster.names import Component, Role, WorkerId
from cluster.pairing import CacheLayout
from cluster.snapshot import WorkerEntry
from cluster.targets import Address, target_list
from cluster.worker_state import Observed, ObservedWorker, WorkerState

WANTED = {Role.PREFILL: 2, Role.DECODE: 4}


class FakeScaler:
    """Signals and a page of decisions that a test sets."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.page: list[dict[str, Any]] = []

    def signals(self) -> Mapping[str, float]:
        return self.now

    def decisions(self, after: int, limit: int) -> list[dict[str, Any]]:
        return [record for record in self.page if record["seq"] > after][:limit]

    def decide(self, raw: list[int] | None, final: list[int], ratio: float | None = None) -> None:
        decision = {"action": "out", "driver": "signal", "raw": raw, "final": final}
        state = {"estimated_ratio": ratio}
        self.page.append({"seq": len(self.page) + 1, "decision": decision, "state": state})


def sample(name: str, **labels: str) -> float | None:
    return REGISTRIES[Component.CONTROLLER].get_sample_value(f"tandem_{name}", labels)


def ready(prefill: int, decode: int) -> Observed:
    counts = {Role.PREFILL: prefill, Role.DECODE: decode}
    return Observed(
        tuple(
            ObservedWorker(WorkerId(f"{role}-{n}"), role, WorkerState.READY)
            for role, count in counts.items()
            for n in range(count)
        )
    )


def shown(observed: Observed, scaler: FakeScaler, **section: Any) -> ControllerMetrics:
    metrics = ControllerMetrics(parse_config({"autoscaler": {"ratio": "1:2", **section}}))
    metrics.show(observed, WANTED, scaler, 100.0)
    return metrics


def test_pairs_that_do_not_fit_are_counted() -> None:
    observed = ready(2, 4)
    shown(observed, FakeScaler())
    assert sample("refused_pairs") == 0
    first, *others = observed.workers
    shown(Observed((replace(first, layout=CacheLayout("other")), *others)), FakeScaler())
    assert sample("refused_pairs") == 4


def test_pools_are_counted_by_state() -> None:
    shown(ready(1, 4), FakeScaler())
    assert sample("workers", pool="decode", state="ready") == 4
    assert sample("workers", pool="decode", state="draining") == 0
    assert sample("wanted_workers", pool="prefill") == 2
    assert (sample("ready_ratio"), sample("target_ratio")) == (0.25, 0.5)
    assert sample("healthy") == 1
    shown(ready(1, 0), FakeScaler())
    assert math.isnan(sample("ready_ratio") or 0.0)
    assert sample("healthy") == 0


def test_the_signal_stands_beside_what_the_ready_workers_should_carry() -> None:
    scaler = FakeScaler()
    scaler.now = {"decode_tps": 900.0, "ttft": 0.5}
    metrics = shown(ready(1, 4), scaler, target_per_worker=300.0, slo_ttft_s=2.0)
    assert sample("signal", signal="decode_tps") == 900.0
    assert sample("signal_target", signal="decode_tps") == 1200.0
    assert sample("objective_seconds", objective="ttft") == 2.0
    scaler.now = {"decode_tps": 0.0}
    metrics.show(ready(1, 4), WANTED, scaler, 101.0)
    assert sample("signal", signal="ttft") is None, "it is not known any more"


def test_decisions_are_counted_once_and_only_this_controller_s() -> None:
    scaler = FakeScaler()
    scaler.decide([3, 6], [2, 4])
    labels = {"action": "out", "driver": "signal"}
    before = sample("decisions_total", **labels) or 0.0
    metrics = shown(ready(1, 2), scaler)
    assert (sample("decisions_total", **labels) or 0.0) == before
    assert sample("raw_target_workers", pool="decode") == 6
    scaler.decide(None, [2, 5], ratio=0.4)
    for _ in range(2):
        metrics.show(ready(1, 2), WANTED, scaler, 101.0)
    assert sample("decisions_total", **labels) == before + 1
    assert sample("final_target_workers", pool="decode") == 5
    assert sample("raw_target_workers", pool="decode") is None
    metrics.show(ready(1, 2), WANTED, scaler, 102.0)
    assert sample("target_ratio") == 0.4


def test_targets_say_who_they_are() -> None:
    entry = WorkerEntry(WorkerId("w"), Role.DECODE, "tcp://h:1", 7, "n1", exporter="h:2")
    groups = target_list("t", Address("h:3", "n0", 0.0), [Address("h:4", "n2", 0.0)], [entry])
    assert groups == [
        {
            "targets": ["h:3"],
            "labels": {"deployment": "t", "component": "controller", "node": "n0"},
        },
        {"targets": ["h:4"], "labels": {"deployment": "t", "component": "router", "node": "n2"}},
        {
            "targets": ["h:2"],
            "labels": {
                "deployment": "t",
                "component": "worker",
                "node": "n1",
                "worker_id": "w",
                "role": "decode",
            },
        },
    ]
