"""From reports to a snapshot: restarts, silence and role changes never look like load."""

import json
from dataclasses import dataclass, field, replace

import pytest

from autoscaler.signals import PoolCounts, Signals, Snapshot
from autoscaler.windows import Missing
from cluster.latency import LatencyObserver
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role, RouterId, WorkerId
from cluster.worker_state import WorkerState
from tests.unit.autoscaler.samples import section


def worker(name: str, role: Role = Role.DECODE, **changes: object) -> WorkerLoad:
    load = WorkerLoad(WorkerId(name), role, WorkerState.READY, 1, at=0.0)
    return replace(load, **changes)  # type: ignore[arg-type]  # any field by name


@dataclass
class Fleet:
    """Workers and a router that report once a second, each counter growing at its own pace."""

    workers: list[WorkerLoad]
    router: RouterLoad = field(default_factory=lambda: RouterLoad(RouterId("r"), 0.0))
    signals: Signals = field(default_factory=lambda: Signals(section()))
    now: float = 0.0

    def run(self, seconds: int, *, tokens: int = 0, busy: float = 0.0, arrivals: int = 0) -> None:
        """Report for some seconds; every worker makes `tokens` and is busy for a share `busy`."""
        for _ in range(seconds):
            self.now += 1
            self.workers = [self._later(each, tokens, busy) for each in self.workers]
            self.router = replace(
                self.router,
                at=self.now,
                arrived=self.router.arrived + arrivals,
                finished=self.router.finished + arrivals,
                prompt_tokens=self.router.prompt_tokens + 50 * arrivals,
                output_tokens=self.router.output_tokens + 20 * arrivals,
            )
            self.signals.add(ClusterLoad(self.now, tuple(self.workers), (self.router,)))

    def _later(self, load: WorkerLoad, tokens: int, busy: float) -> WorkerLoad:
        if load.at is None:
            return load
        return replace(
            load,
            at=self.now,
            generated_tokens=load.generated_tokens + tokens,
            computed_prompt_tokens=load.computed_prompt_tokens + 2 * tokens,
            busy_s=load.busy_s + busy,
        )

    def read(self) -> Snapshot:
        return self.signals.read(self.now)


def test_throughput_is_summed_over_the_workers_of_its_role() -> None:
    fleet = Fleet([worker("d0"), worker("d1"), worker("p0", Role.PREFILL)])
    fleet.run(100, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(100)
    assert fleet.read().prefill_tps == pytest.approx(100)


def test_workers_count_by_their_state() -> None:
    states = [each.value for each in WorkerState]
    fleet = Fleet([worker(name, state=WorkerState(name)) for name in states])
    fleet.run(1)
    counts = fleet.read().decode
    assert counts == PoolCounts(serving=1, held=1, starting=4, soft_out=1, standby=1)
    assert (counts.ready, counts.provisioned) == (2, 6)


def test_a_worker_that_is_draining_still_makes_tokens() -> None:
    fleet = Fleet([worker("d0"), worker("d1", state=WorkerState.DRAINING)])
    fleet.run(100, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(100)
    assert fleet.read().decode.provisioned == 1


def test_a_restart_of_a_worker_is_no_load() -> None:
    fleet = Fleet([worker("d0"), worker("d1", generated_tokens=1_000_000)])
    fleet.run(100, tokens=50)
    fleet.workers[1] = worker("d1", epoch=2)
    fleet.run(30, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(100, rel=0.02)
    fleet.workers = fleet.workers[:1]
    fleet.run(60, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(50)


def test_a_role_change_moves_a_worker_to_the_other_signal() -> None:
    fleet = Fleet([worker("d0"), worker("d1")])
    fleet.run(100, tokens=50)
    fleet.workers[1] = replace(fleet.workers[1], role=Role.PREFILL)
    fleet.run(61, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(50)
    assert fleet.read().prefill_tps == pytest.approx(100)


def test_utilisation_is_busy_time_over_time_served() -> None:
    fleet = Fleet([worker("d0"), worker("d1", state=WorkerState.HELD)])
    fleet.run(100, busy=0.4)
    assert fleet.read().decode_util == pytest.approx(0.4)


def test_lengths_and_arrivals_come_from_the_routers() -> None:
    fleet = Fleet([worker("d0")])
    fleet.run(30, arrivals=3)
    snapshot = fleet.read()
    assert snapshot.arrivals_per_s == pytest.approx(3)
    assert (snapshot.prompt_tokens, snapshot.output_tokens) == (50, 20)
    fleet.run(20)
    assert fleet.read().arrivals_per_s == 0 and fleet.read().prompt_tokens == 50


def test_latencies_are_the_configured_quantile_of_all_routers() -> None:
    fleet = Fleet([worker("d0")])
    fleet.run(1)
    observer = LatencyObserver()
    for milliseconds in range(1, 101):
        observer.observe(milliseconds / 1000)
    fleet.router = replace(fleet.router, tbt=observer.counts())
    fleet.run(50)
    assert fleet.read().tbt_s == pytest.approx(0.095, rel=0.06)
    assert fleet.read().ttft_s == Missing("no request in the window", is_idle=True)


def test_what_was_never_heard_is_missing() -> None:
    snapshot = Signals(section()).read(0.0)
    assert snapshot.decode_tps == Missing("no decode worker has been seen")
    assert snapshot.tbt_s == Missing("no router has been seen")


def test_a_worker_that_has_not_reported_yet_spoils_nothing() -> None:
    fleet = Fleet([worker("d0"), worker("d1", at=None)])
    fleet.run(100, tokens=50)
    assert fleet.read().decode_tps == pytest.approx(50)


def test_workers_that_fell_silent_make_their_pool_unknown() -> None:
    fleet = Fleet([worker("d0"), worker("p0", Role.PREFILL)])
    fleet.run(60, tokens=50)
    silent = fleet.workers[0]
    for second in range(1, 131):
        load = ClusterLoad(fleet.now + second, (silent,), ())
        fleet.signals.add(load)
    snapshot = fleet.signals.read(fleet.now + 130)
    says = "1 of 1 serving decode workers have not reported for 120 s"
    assert snapshot.decode_tps == Missing(says)
    assert snapshot.prefill_tps == Missing("no serving prefill worker has reported")
    assert snapshot.ttft_s == Missing("no router has reported")


def test_samples_that_stop_are_stale() -> None:
    fleet = Fleet([worker("d0")])
    fleet.run(100, tokens=50)
    assert fleet.signals.read(fleet.now + 120).decode_tps == pytest.approx(50)
    assert fleet.signals.read(fleet.now + 121).decode_tps == Missing("the last report is 121 s old")


def test_a_snapshot_survives_json() -> None:
    fleet = Fleet([worker("d0")])
    fleet.run(100, tokens=7, arrivals=1)
    snapshot = fleet.read()
    assert Snapshot.from_document(json.loads(json.dumps(snapshot.as_document()))) == snapshot
