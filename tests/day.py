"""The published day of load on 24 simulated workers and four Ray nodes, compressed in time.

The curve is `deploy/loadtest/data/heteroscale_24h.csv`; windows, periods and cooldowns are
divided by the same factor as the day. Workers are simulated, everything else is not: Ray,
placement groups, sockets, hand-offs, the router and the control loop.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autoscaler.decision_log import Record
from autoscaler.recording import Recording
from cluster.topology import LOGICAL_CLUSTER_LABEL, S1_LABEL, S2_LABEL
from deploy.loadtest.arrivals import read_curve
from tests.day_verdict import Verdict, judge
from tests.on_cluster import ray_cluster, tandem_on
from tests.paced_load import LoadReport, paced_load
from tests.served import Served

NODES, MOST_WORKERS = 4, 24
TARGET_TPS, PEAK_TPS = 16.0, 0.95 * 16.0 * MOST_WORKERS / 2
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
# What the day is held to.
MEMORY_LIMIT_BYTES = 150 << 20
WITHIN_LIMIT = 0.9


@dataclass(frozen=True)
class Cut:
    """Which hours of the day, and how many times as fast."""

    begin_h: float = 0.0
    hours: float = 24.0
    speedup: float = 120.0

    @property
    def length_s(self) -> float:
        return 3600 * self.hours / self.speedup


def flags(cut: Cut, decision_file: Path) -> dict[str, object]:
    return {
        "model.engine": "simulated",
        "model.max_model_len": 512,
        "model.block_size": 16,
        "simulated.decode_step_s": 0.04,
        "router.worker_timeout_s": 10.0,
        "autoscaler.mode": "act",
        "autoscaler.target_per_worker": TARGET_TPS,
        "autoscaler.max_prefill": MOST_WORKERS // 2,
        "autoscaler.max_decode": MOST_WORKERS // 2,
        "autoscaler.speedup": cut.speedup,
        "autoscaler.scale_out_threshold": 0.05,
        "autoscaler.scale_in_threshold": 0.08,
        "autoscaler.decision_file": str(decision_file),
        "autoscaler.decision_records": 10_000,
    }


class Load:
    """The load of a cut, sent from a thread of its own."""

    def __init__(self, served: Served, cut: Cut) -> None:
        curve, began = read_curve("dialogue_decode"), time.monotonic()

        def rate(elapsed_s: float) -> float:
            hour = cut.begin_h + elapsed_s * cut.speedup / 3600
            return max(0.2, curve.at(hour) * PEAK_TPS / OUTPUT_TOKENS)

        def run() -> None:
            self.report: LoadReport = asyncio.run(
                paced_load(
                    served.url,
                    served.model,
                    rate,
                    PROMPT_TOKENS,
                    OUTPUT_TOKENS,
                    is_over=lambda: time.monotonic() - began > cut.length_s,
                )
            )

        self.thread = threading.Thread(target=run)
        self.thread.start()


@dataclass(frozen=True)
class Run:
    """What became of a cut: its requests, every decision, the largest worker's RSS."""

    load: LoadReport
    records: Sequence[Record]
    verdict: Verdict
    largest_bytes: int


def follow(cut: Cut, name: str, folder: Path) -> Run:
    """Let a deployment of this name, on a cluster of its own, follow the cut."""
    decisions = folder / "decisions.jsonl"
    settings, largest = flags(cut, decisions), 0
    nodes = [node(number) for number in range(NODES)]
    with ray_cluster(nodes) as cluster, tandem_on(cluster, name, settings) as served:
        load = Load(served, cut)
        while load.thread.is_alive():
            largest = max([largest, *worker_memory()])
            load.thread.join(5.0)
    recording = Recording.parse(decisions.read_text())
    section = recording.settings[0]
    assert section is not None
    verdict = judge(recording.records, section)
    return Run(load.report, recording.records, verdict, largest)


def node(number: int) -> dict[str, Any]:
    """Return a node's arguments: two S2 switches of two S1 switches each."""
    labels = {
        LOGICAL_CLUSTER_LABEL: "day",
        S2_LABEL: f"s2-{number // 2}",
        S1_LABEL: f"s1-{number % 2}",
    }
    return {"num_cpus": 2 * MOST_WORKERS // NODES, "labels": labels}


def worker_memory() -> list[int]:
    """Return the resident bytes of each worker actor."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error, OSError):
            if "ray::WorkerActor" in " ".join(process.info["cmdline"] or []):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                found.append(1024 * int(rollup.split("\nRss:")[1].split()[0]))
    return found
