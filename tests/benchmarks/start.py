"""`make bench-start`: how soon a worker serves: from nothing, from standby, from the other role.

Cold, over a plain `vllm serve`: a worker of a running deployment is killed and its replacement
timed, from the controller's decision to an engine that serves; in turn with it the same engine
behind vLLM's own server, from its first process to its first healthy answer. Each on one core,
the idle deployment beside both. The other two are in `roles.py`.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.config import BUNDLED_MODEL, parse_config
from cluster.names import Role, WorkerId
from cluster.worker_process import WorkerProcess
from cluster.worker_spec import WorkerSpec
from deploy.engines import ENGINES, ROLES
from tests.benchmarks.engine_settings import (
    DTYPE,
    KV_CACHE_GIB,
    MAX_MODEL_LEN,
    model_section,
    tandem_settings,
    vllm_settings,
)
from tests.benchmarks.roles import PERIOD_S, RoleTimes, time_roles
from tests.benchmarks.sections import table, write_section
from tests.served import Served, monolith, tandem, wait_until

NAME = "bench-start"
NUM_ROUNDS = 3
REPLACED_WITHIN_S = 120.0
LIMIT = 0.5
ROLE_LIMIT_S = 1.0


def decode_worker(served: Served) -> dict[str, Any] | None:
    """Return the status of the deployment's decode worker, once it serves."""
    workers = served.state().get("workers", [])
    found = [w for w in workers if w["role"] == "decode" and w["state"] == "ready"]
    return found[0] if found else None


def time_replacement(served: Served) -> float:
    """Kill the decode worker and return how long its replacement took to start, in seconds."""
    killed = wait_until(lambda: decode_worker(served), REPLACED_WITHIN_S, "a decode worker serves")
    psutil.Process(killed["pid"]).kill()

    def replacement() -> dict[str, Any] | None:
        worker = decode_worker(served)
        return worker if worker and worker["worker_id"] != killed["worker_id"] else None

    worker = wait_until(replacement, REPLACED_WITHIN_S, "the replacement serves")
    return float(worker["start_s"])


def time_monolith(model: Path) -> float:
    """Return how long vLLM's own server takes to its first healthy answer, in seconds."""
    began = time.monotonic()
    with monolith(model=model, cpus="0", **vllm_settings()):
        return time.monotonic() - began


async def time_template(model: Path) -> tuple[float, float]:
    """Return how long a first fork takes, with the template's own start, and a second one."""
    section = {"path": str(model), **model_section()}
    config, worker_id = parse_config({"model": section}), WorkerId("bench")
    engine = ENGINES["vllm"]
    spec = WorkerSpec(worker_id, Role.DECODE, engine, ROLES, config, (0,), "127.0.0.1")
    taken = []
    for _ in range(2):
        process, began = WorkerProcess(spec, f"bench-{os.getpid()}"), time.monotonic()
        await process.fork()
        taken.append(time.monotonic() - began)
        await process.stop()
        await process.run()
    return taken[0], taken[1]


def cold_start(ours: list[float], theirs: list[float]) -> tuple[str, bool]:
    """Return the figures of cold starts, and whether their limit holds."""
    ratio = statistics.median(ours) / statistics.median(theirs)
    rows = [
        [name, f"{statistics.median(taken):.1f}", " ".join(f"{t:.1f}" for t in taken)]
        for name, taken in (("worker, from the template", ours), ("`vllm serve`", theirs))
    ]
    is_held = ratio <= LIMIT
    body = table(["cold start", "median s", "each s"], rows) + (
        f"\n\nRatio {ratio:.2f}, limit {LIMIT}: {verdict(is_held)}. Both: bundled model, {DTYPE},"
        f" {KV_CACHE_GIB} GiB of KV cache, context {MAX_MODEL_LEN}, eager, pinned to one core,"
        " beside an idle 1P1D deployment. The worker's time contains its Ray actor's start."
    )
    return body, is_held


def new_roles(times: RoleTimes) -> tuple[str, bool]:
    """Return the figures of role changes, and whether their limit holds."""
    named = (
        ("prefill to decode", times.to_decode),
        ("decode to prefill", times.to_prefill),
        ("standby to decode", times.standby),
    )
    rows = [[name, f"{statistics.median(taken):.2f}", f"{max(taken):.2f}"] for name, taken in named]
    is_held = max(max(taken) for _, taken in named) <= ROLE_LIMIT_S
    body = table(["new role", "median s", "worst s"], rows) + (
        f"\n\nLimit {ROLE_LIMIT_S:g} s: {verdict(is_held)}. Flips: from the old role's last request"
        " done to the new role's first one done; standby: from the order given to the first"
        f" request done. {len(times.standby)} times each, 2P1D and a standby, the same engines,"
        f" a request every {PERIOD_S:g} s; none failed."
    )
    return body, is_held


def verdict(is_held: bool) -> str:
    return "held" if is_held else "NOT held"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    rounds = parser.parse_args().rounds
    template = asyncio.run(time_template(BUNDLED_MODEL))
    with tandem(NAME, **tandem_settings()) as served:
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(time_replacement(served))
            theirs.append(time_monolith(BUNDLED_MODEL))
    cold, is_cold_held = cold_start(ours, theirs)
    changes, are_changes_held = new_roles(time_roles(rounds, **tandem_settings()))
    once = (
        f"The node's template, once per node: {template[0]:.1f} s from nothing to its first"
        f" fork; a later fork {1e3 * template[1]:.0f} ms."
    )
    write_section("start", "make bench-start", f"{cold}\n\n{once}\n\n{changes}")
    return 0 if is_cold_held and are_changes_held else 1


if __name__ == "__main__":
    sys.exit(main())
