"""`make bench`: the price of the disaggregated path over one monolithic vLLM engine.

Both endpoints run at once on the bench model; requests go to one and the other in turn, one at
a time, so that whatever else the machine does meets both. One core per engine.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.models.bench import ensure_bench_model
from deploy.processes import find_marked
from deploy.state import DeploymentState
from tests.benchmarks.engine_settings import (
    CHUNK_TOKENS,
    DTYPE,
    MODEL,
    tandem_settings,
    vllm_settings,
)
from tests.benchmarks.sections import table, write_section
from tests.served import Served, monolith, tandem

NAME = "bench"
PROMPT_LENGTHS = (128, 512, 1500)
NUM_NEW_TOKENS = 32
NUM_ROUNDS = 5
REQUESTS_PER_ROUND = 1
# vLLM's processes spin on their core this long after their last step, and both share core 0.
SETTLE_S = 1.2
TTFT_LIMIT, ITL_LIMIT = 1.25, 1.1


@dataclass(frozen=True)
class Timing:
    """One request: time to the first token, and the median time between tokens, in seconds."""

    ttft_s: float
    itl_s: float


def measure(served: Served, prompt: Sequence[int]) -> Timing:
    """Stream one completion and time its tokens where a client sees them."""
    began, stamps = token_times(served, prompt, NUM_NEW_TOKENS)
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    return Timing(stamps[0] - began, statistics.median(gaps))


def token_times(
    served: Served, prompt: Sequence[int], num_new_tokens: int
) -> tuple[float, list[float]]:
    """Return when a streamed completion was asked for, and when each token came, in seconds."""
    body = {
        "model": served.model,
        "prompt": list(prompt),
        "max_tokens": num_new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    stamps: list[float] = []
    began = time.perf_counter()
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                stamps.append(time.perf_counter())
    return began, stamps


def proportional_bytes(served: Served, deployment: str | None = None) -> int:
    """Return the PSS of the process tree: shared pages counted once.

    With the processes that carry the deployment's mark: engines are forked from the node's
    template and are nobody's children here.
    """
    root = psutil.Process(served.process.pid)
    pids = {process.pid for process in (root, *root.children(recursive=True))}
    if deployment is not None:
        state = DeploymentState.read(deployment)
        assert state is not None, f"{deployment} runs"
        pids |= {process.pid for process in find_marked(state.mark)}
    return sum(map(_proportional_bytes, pids))


def _proportional_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended since
    return 1024 * int(rollup.split("\nPss:")[1].split()[0])


def run(rounds: int, served: dict[str, Served]) -> dict[tuple[str, int], list[Timing]]:
    """Return per endpoint and prompt length one timing per round: the median of its requests."""
    rng = random.Random(3)
    timings: dict[tuple[str, int], list[Timing]] = defaultdict(list)
    for number in range(rounds + 1):
        for length in PROMPT_LENGTHS:
            for name, endpoint in served.items():
                # Fresh tokens each time: no prefix cache helps anyone.
                prompts = [
                    [rng.randrange(300, 4000) for _ in range(length)]
                    for _ in range(REQUESTS_PER_ROUND)
                ]
                time.sleep(SETTLE_S)
                taken = [measure(endpoint, prompt) for prompt in prompts]
                ttft_s = statistics.median(timing.ttft_s for timing in taken)
                itl_s = statistics.median(timing.itl_s for timing in taken)
                if number > 0:  # The first round warms both up.
                    timings[name, length].append(Timing(ttft_s, itl_s))
    return timings


def pinning(served: Served) -> str:
    """Return where the deployment said it pinned its engines."""
    said = re.findall(r"(\S+) starts, engine pinned to core\(s\) (\S+)", served.log.read_text())
    return ", ".join(f"{worker} on core {cores}" for worker, cores in sorted(said))


def report(
    timings: dict[tuple[str, int], list[Timing]], memory: dict[str, int], pinned: str
) -> bool:
    """Print and write the table; return whether the limits hold."""
    rows, is_within = [], True
    for length in PROMPT_LENGTHS:
        ours, theirs = timings["tandem", length], timings["vllm", length]
        ttft = [statistics.median(t.ttft_s for t in taken) for taken in (ours, theirs)]
        itl = [statistics.median(t.itl_s for t in taken) for taken in (ours, theirs)]
        ratios = ttft[0] / ttft[1], itl[0] / itl[1]
        is_within &= ratios[1] <= ITL_LIMIT and (length < 1500 or ratios[0] <= TTFT_LIMIT)
        rows.append(
            [
                length,
                *(f"{1e3 * value:.1f}" for value in ttft),
                f"{ratios[0]:.2f}",
                *(f"{1e3 * value:.2f}" for value in itl),
                f"{ratios[1]:.2f}",
            ]
        )
    header = ["prompt tokens", "TTFT ms, 1P1D", "vLLM", "ratio", "ITL ms, 1P1D", "vLLM", "ratio"]
    body = table(header, rows) + (
        f"\n\nMedian of {len(timings['vllm', PROMPT_LENGTHS[0]])} interleaved rounds,"
        f" concurrency 1, {NUM_NEW_TOKENS} new tokens, {DTYPE}, chunk {CHUNK_TOKENS}, eager, no"
        f" prefix hits. Pinning: {pinned}, the monolithic engine on core 0; router, proxies and"
        " client float.\n\n"
        f"Idle PSS of all processes: 1P1D deployment {memory['tandem'] / 2**30:.2f} GiB"
        " (two engines and their template, Ray, router, proxy), vLLM"
        f" {memory['vllm'] / 2**30:.2f} GiB (one engine)."
        f"\n\nLimits: TTFT ratio at 1,500 tokens at most {TTFT_LIMIT}, ITL ratio at most"
        f" {ITL_LIMIT}: {'held' if is_within else 'NOT held'}."
    )
    write_section("serve", "make bench", body)
    return is_within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    rounds = parser.parse_args().rounds
    assert len(os.sched_getaffinity(0)) >= 2, "needs two cores: one per engine"
    model = ensure_bench_model(MODEL)
    with (
        tandem(NAME, model=model, **tandem_settings()) as ours,
        monolith(model=model, cpus="0", **vllm_settings()) as theirs,
    ):
        served = {"tandem": ours, "vllm": theirs}
        memory = {"tandem": proportional_bytes(ours, NAME), "vllm": proportional_bytes(theirs)}
        return 0 if report(run(rounds, served), memory, pinning(ours)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
