"""`make bench-decisions`: what one decision over ten thousand workers costs."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

from autoscaler.decision import PolicyState
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.signals import Signals
from cluster.autoscaler_config import AutoscalerSection
from cluster.latency import LatencyObserver
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role, RouterId, WorkerId
from cluster.worker_state import WorkerState
from tests.benchmarks.sections import table, write_section

NUM_WORKERS = 10_000
NUM_ROUTERS = 16
NUM_SAMPLES = 130
TOKENS_PER_S = 40
LIMIT_S = 0.05

CONFIG = AutoscalerSection(
    mode="act",
    target_per_worker=60.0,
    max_prefill=NUM_WORKERS,
    max_decode=NUM_WORKERS,
    slo_tbt_s=0.1,
    slo_ttft_s=2.0,
)


def load_at(second: float) -> ClusterLoad:
    """Return a cluster of which every worker has made tokens since the start."""
    observer = LatencyObserver()
    for step in range(int(second) + 1):
        observer.observe(0.02 + 0.0001 * step)
    workers = tuple(
        WorkerLoad(
            WorkerId(f"worker-{index}"),
            (Role.PREFILL, Role.DECODE)[index % 2],
            WorkerState.READY,
            1,
            at=second,
            generated_tokens=int(TOKENS_PER_S * second),
            computed_prompt_tokens=int(4 * TOKENS_PER_S * second),
            busy_s=0.9 * second,
        )
        for index in range(NUM_WORKERS)
    )
    counts, count = observer.counts(), int(second * 10)
    routers = tuple(
        RouterLoad(
            RouterId(f"router-{index}"),
            second,
            arrived=count,
            finished=count,
            prompt_tokens=400 * count,
            output_tokens=100 * count,
            ttft=counts,
            tbt=counts,
        )
        for index in range(NUM_ROUTERS)
    )
    return ClusterLoad(second, workers, routers)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure() -> tuple[list[float], list[float]]:
    """Return the seconds of each sample taken in, and of each decision (read and decide)."""
    signals = Signals(CONFIG)
    half = Sizes(NUM_WORKERS // 2, NUM_WORKERS // 2)
    state = PolicyState(half)
    samples, decisions = [], []
    for index in range(NUM_SAMPLES):
        second = index / 2
        load = load_at(second)
        samples.append(timed(lambda load=load: signals.add(load)))  # type: ignore[misc]
        decisions.append(
            timed(lambda at=second: decide(CONFIG, state, signals.read(at), at))  # type: ignore[misc]
        )
    return samples[1:], decisions[1:]


def row(name: str, seconds: Sequence[float]) -> list[str]:
    median, worst = statistics.median(seconds), max(seconds)
    return [name, f"{1000 * median:.2f}", f"{1000 * worst:.2f}"]


def main() -> int:
    samples, decisions = measure()
    rows = [row("sample (0.5 s)", samples), row("decision (read and decide)", decisions)]
    figures = table(["step", "median ms", "worst ms"], rows)
    about = f"{NUM_WORKERS:,} workers, {NUM_ROUTERS} routers, {NUM_SAMPLES} samples in the windows"
    verdict = f"limit for a decision: {1000 * LIMIT_S:g} ms, worst {1000 * max(decisions):.2f} ms"
    write_section("decisions", "make bench-decisions", f"{about}.\n\n{figures}\n\n{verdict}")
    return 0 if max(decisions) < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
