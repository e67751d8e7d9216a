"""`make bench-day`: a day of load in minutes on 24 simulated workers and four Ray nodes.

The curve is the published one (`deploy/loadtest/data/heteroscale_24h.csv`); windows, periods and
cooldowns are divided by the same factor as the day. Workers are simulated, everything else is
not: Ray, placement groups, sockets, hand-offs, the router and the control loop.
"""

import argparse
import asyncio
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from autoscaler.decision import Action
from autoscaler.decision_log import Record, parse_records
from cluster.config import TandemConfig, parse_config
from cluster.ray_plane import NAMESPACE
from cluster.topology import LOGICAL_CLUSTER_LABEL, S1_LABEL, S2_LABEL
from deploy.loadtest.arrivals import read_curve
from deploy.ports import free_port
from tests.benchmarks.sections import table, write_section
from tests.paced_load import LoadReport, paced_load
from tests.served import Served, start, stop, tandem_command

DAY_S = 24 * 3600.0
SPEEDUP = 120.0
NODES, MOST_WORKERS = 4, 24
TARGET_TPS, PEAK_TPS = 16.0, 0.95 * 16.0 * MOST_WORKERS / 2
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
MEMORY_LIMIT_BYTES = 150 << 20
WITHIN_LIMIT = 0.9
NAME = "bench-day"


def flags(decision_file: Path) -> dict[str, object]:
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
        "autoscaler.speedup": SPEEDUP,
        "autoscaler.scale_out_threshold": 0.05,
        "autoscaler.scale_in_threshold": 0.08,
        "autoscaler.decision_file": str(decision_file),
        "autoscaler.decision_records": 10_000,
    }


class Day:
    """The load of one compressed day, sent from a thread of its own."""

    def __init__(self, served: Served, hours: float) -> None:
        curve, length_s = read_curve("dialogue_decode"), 3600 * hours / SPEEDUP
        began = time.monotonic()

        def rate(elapsed_s: float) -> float:
            return max(0.2, curve.at(elapsed_s * SPEEDUP / 3600) * PEAK_TPS / OUTPUT_TOKENS)

        def run() -> None:
            self.report: LoadReport = asyncio.run(
                paced_load(
                    served.url,
                    served.model,
                    rate,
                    PROMPT_TOKENS,
                    OUTPUT_TOKENS,
                    is_over=lambda: time.monotonic() - began > length_s,
                )
            )

        self.thread = threading.Thread(target=run)
        self.thread.start()


@dataclass(frozen=True)
class Verdict:
    """How well the fleet followed: decisions after a cooldown, and those that were right.

    `off_ratio` are decisions at which the pools in service were out of ratio though ready workers
    were there to mend it; `waiting` those at which such workers were not ready yet.
    """

    num_ticks: int
    num_within: int
    off_ratio: tuple[Record, ...]
    waiting: tuple[Record, ...]
    num_actions: int

    @property
    def share_within(self) -> float:
        return self.num_within / max(1, self.num_ticks)


def judge(records: Sequence[Record], config: TandemConfig) -> Verdict:
    """Compare each decision that no cooldown hindered with the published law."""
    section = config.autoscaler
    cooldown_s = section.scaled(section.cooldown_in_s)
    acted_at, ticks, within, num_actions = -math.inf, 0, 0, 0
    off_ratio: list[Record] = []
    waiting: list[Record] = []
    for record in records:
        final = record.decision.final
        if is_off_ratio(record, section.gate_tolerance):
            pools = (record.snapshot.prefill, record.snapshot.decode)
            behind = min(pools, key=lambda pool: pool.serving)
            (off_ratio if behind.held else waiting).append(record)
        is_action = record.decision.action is not Action.HOLD
        tps = record.snapshot.decode_tps
        if not is_action and record.now - acted_at >= cooldown_s and isinstance(tps, float):
            needed = math.ceil(tps / TARGET_TPS)
            needed = min(max(needed, section.min_decode), section.max_decode)
            ticks += 1
            within += abs(final.decode - needed) <= 1
        if is_action:
            num_actions += 1
            acted_at = record.now
    return Verdict(ticks, within, tuple(off_ratio), tuple(waiting), num_actions)


def is_off_ratio(record: Record, tolerance: float) -> bool:
    """Return whether the pools in service are further from 1:1 than one worker or `tolerance`."""
    prefill, decode = record.snapshot.prefill.serving, record.snapshot.decode.serving
    return abs(prefill - decode) > max(1.0, tolerance * min(prefill, decode))


def worker_memory() -> list[int]:
    """Return the resident bytes of each worker actor."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error, OSError):
            if "ray::WorkerActor" in " ".join(process.info["cmdline"] or []):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                found.append(1024 * int(rollup.split("\nRss:")[1].split()[0]))
    return found


def labels(number: int) -> dict[str, str]:
    """Two S2 switches of two S1 switches each."""
    return {
        LOGICAL_CLUSTER_LABEL: "bench",
        S2_LABEL: f"s2-{number // 2}",
        S1_LABEL: f"s1-{number % 2}",
    }


def start_cluster() -> Cluster:
    store = {"object_store_memory": 100 << 20, "num_cpus": 2 * MOST_WORKERS // NODES}
    cluster = Cluster(initialize_head=True, head_node_args={**store, "labels": labels(0)})
    for number in range(1, NODES):
        cluster.add_node(**store, labels=labels(number))
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    return cluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0, help="how much of the day")
    hours = parser.parse_args().hours
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so
    with tempfile.TemporaryDirectory(prefix="bench-day-") as folder:
        decisions = Path(folder) / "decisions.jsonl"
        cluster = start_cluster()
        try:
            return _measure(cluster.address, decisions, hours)
        finally:
            command = [sys.executable, "-m", "deploy.cli", "down", "--name", NAME]
            subprocess.run(command, check=False)
            ray.shutdown()
            cluster.shutdown()


def _measure(address: str, decisions: Path, hours: float) -> int:
    port, settings = free_port(), flags(decisions)
    command = tandem_command(NAME, port, {**settings, "address": address}, "serve")
    served = start(command, f"http://127.0.0.1:{port}", "tandem-tiny")
    try:
        day = Day(served, hours)
        largest = 0
        while day.thread.is_alive():
            largest = max([largest, *worker_memory()])
            day.thread.join(5.0)
    finally:
        stop(served)
    document: dict[str, dict[str, object]] = {}
    for path, value in settings.items():
        section, _, key = path.partition(".")
        document.setdefault(section, {})[key] = value
    records = parse_records(decisions.read_text())
    return 0 if report(day.report, judge(records, parse_config(document)), records, largest) else 1


def _listed(records: Sequence[Record]) -> str:
    numbers = ", ".join(
        f"#{r.seq} ({r.snapshot.prefill.serving}:{r.snapshot.decode.serving})" for r in records[:40]
    )
    return f"{len(records)}: {numbers}" if records else "0"


def report(load: LoadReport, verdict: Verdict, records: Sequence[Record], largest: int) -> bool:
    """Print and write the table; return whether the limits hold."""
    sizes = [record.decision.final for record in records]
    least, most = (pick(s.decode for s in sizes) for pick in (min, max))
    rows: list[list[object]] = [
        ["requests sent, failed", f"{load.num_sent}, {len(load.failures)}"],
        ["decisions, steps", f"{len(records)}, {verdict.num_actions}"],
        ["decode workers, least to most", f"{least} to {most}"],
        [
            "D within 1 of ceil(M/m*) after a cooldown",
            f"{100 * verdict.share_within:.1f} % of {verdict.num_ticks} decisions",
        ],
        ["decisions with P:D out of tolerance", len(verdict.off_ratio)],
        ["the same, because workers were not ready yet", _listed(verdict.waiting)],
        ["largest worker, RSS", f"{largest / 2**20:.0f} MiB"],
    ]
    is_within = (
        not load.failures
        and verdict.share_within >= WITHIN_LIMIT
        and not verdict.off_ratio
        and largest <= MEMORY_LIMIT_BYTES
    )
    body = table(["a day in minutes", ""], rows)
    for failure in load.failures[:5]:
        print(failure)
    for record in verdict.off_ratio[:20]:
        print("off ratio:", record.seq, record.snapshot.prefill, record.snapshot.decode)
    body += f"\n\nLimits (no failure, 90 %, ratio, 150 MiB): {'held' if is_within else 'NOT held'}."
    body += f" Simulated engines, {NODES} Ray nodes, everything {SPEEDUP:g} times as fast."
    write_section("day", "make bench-day", body)
    return is_within


if __name__ == "__main__":
    raise SystemExit(main())
