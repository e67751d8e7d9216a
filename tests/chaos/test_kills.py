"""Processes killed while requests run: the answers stay right and nothing is left behind."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import zmq.asyncio

from cluster.messages import WorkerSnapshot
from cluster.names import RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.sockets import Sockets
from tests.prompts import prompt_of
from tests.served import Served, tandem, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

NAME = "test-chaos"
PROMPTS = [prompt_of(1800 - 40 * number, seed=9000 + number) for number in range(12)]
PARAMETERS: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
GONE_WITHIN_S = 5.0
REPLACED_WITHIN_S = 240.0


@pytest.fixture(scope="module")
def deployment() -> Iterator[Served]:
    flags: dict[str, Any] = {"model__dtype": "float32", "model__chunk_tokens": 256}
    # The test asks workers itself, and has no keys.
    with tandem(NAME, **flags, model__kv_cache_gib=0.5, security__curve=False) as served:
        yield served


@pytest.fixture(scope="module")
def expected(deployment: Served) -> list[list[int]]:
    return [deployment.tokens(prompt, **PARAMETERS) for prompt in PROMPTS]


def ready_worker(served: Served, role: str) -> dict[str, Any]:
    """Return the status of a pool's worker, once it serves."""

    def find() -> dict[str, Any] | None:
        workers = served.state().get("workers", [])
        return next((w for w in workers if w["role"] == role and w["state"] == "ready"), None)

    return wait_until(find, REPLACED_WITHIN_S, f"a {role} worker serves")


def family(actor_pid: int) -> dict[str, psutil.Process]:
    """Return a worker's processes by what they are."""
    actor = psutil.Process(actor_pid)
    # The worker's process is a fork of the node's template and names its actor in its title.
    titles = {p: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
    (worker,) = [p for p, title in titles.items() if title.strip().endswith(f"actor {actor_pid}")]
    (core,) = [p for p in worker.children() if "EngineCore" in p.name() + " ".join(p.cmdline())]
    (engine_worker,) = [p for p in core.children() if "Worker" in p.name() + " ".join(p.cmdline())]
    return {"actor": actor, "process": worker, "EngineCore": core, "Worker": engine_worker}


def wait_for_transfer(served: Served, known: set[str]) -> None:
    """Return when a request that is not `known` is being handed over."""

    def is_transferring() -> bool:
        recent = served.client.get("/admin/requests?limit=64").json()["requests"]
        return any(r["stage"] == "transfer" and r["exchange_id"] not in known for r in recent)

    deadline = time.monotonic() + 30
    while not is_transferring():
        assert time.monotonic() < deadline, "no request was seen in its transfer"


KILLS: dict[str, Callable[[dict[str, psutil.Process]], list[psutil.Process]]] = {
    "actor": lambda family: [family["actor"]],
    "process": lambda family: [family["process"]],
    "EngineCore": lambda family: [family["EngineCore"]],
    "Worker": lambda family: [family["Worker"]],
    "whole-tree": lambda family: list(family.values()),
}


@pytest.mark.parametrize("victim", KILLS)
def test_prefill_worker_killed_in_a_transfer(
    deployment: Served, expected: list[list[int]], victim: str
) -> None:
    processes = family(ready_worker(deployment, "prefill")["pid"])
    recent = deployment.client.get("/admin/requests?limit=10000").json()["requests"]
    known = {record["exchange_id"] for record in recent}
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures = [pool.submit(deployment.tokens, prompt, **PARAMETERS) for prompt in PROMPTS]
        wait_for_transfer(deployment, known)
        for process in KILLS[victim](processes):
            process.kill()
        _, alive = psutil.wait_procs(processes.values(), timeout=GONE_WITHIN_S)
        assert not alive, f"left {GONE_WITHIN_S:g} s after the kill: {alive}"
        answers = [future.result(timeout=120) for future in futures]
    assert answers == expected
    ready_worker(deployment, "prefill")


def test_decode_worker_killed_is_replaced_and_nothing_hangs(
    deployment: Served, expected: list[list[int]]
) -> None:
    """Streams that had begun end with an error, all others are answered; none hangs."""
    processes = family(ready_worker(deployment, "decode")["pid"])
    processes["EngineCore"].kill()
    _, alive = psutil.wait_procs(processes.values(), timeout=GONE_WITHIN_S)
    assert not alive
    replacement = ready_worker(deployment, "decode")
    assert replacement["pid"] != processes["actor"].pid
    wait_until(deployment.is_healthy, 30, "healthy again")
    assert deployment.tokens(PROMPTS[0], **PARAMETERS) == expected[0]


async def snapshot_of(worker: dict[str, Any], wanted: Callable[[WorkerSnapshot], bool]) -> float:
    """Ask a worker itself until its answer is as `wanted`; return after how many seconds."""
    began = time.monotonic()
    link = WorkerLink(
        Sockets(zmq.asyncio.Context.instance()),
        RouterId("test-observer"),
        WorkerId(worker["worker_id"]),
        worker["endpoint"],
        timeout_s=3.0,
    )
    try:
        while link.snapshot is None or not wanted(link.snapshot):
            assert time.monotonic() - began < 30, link.snapshot
            await asyncio.sleep(0.05)
    finally:
        await link.close()
    return time.monotonic() - began


def test_a_killed_router_leaves_nothing_on_the_workers(
    deployment: Served, expected: list[list[int]]
) -> None:
    workers = [ready_worker(deployment, role) for role in ("prefill", "decode")]
    tree = psutil.Process(deployment.process.pid).children(recursive=True)
    (router,) = [p for p in tree if "ServeReplica" in " ".join(p.cmdline())]
    clients = [
        threading.Thread(target=_try, args=(deployment, prompt), daemon=True) for prompt in PROMPTS
    ]
    for client in clients:
        client.start()
    wait_for_transfer(deployment, set())
    router.send_signal(signal.SIGKILL)

    def is_level(snapshot: WorkerSnapshot) -> bool:
        is_idle = snapshot.num_requests == 0 and snapshot.num_held_blocks == 0
        return is_idle and snapshot.num_free_blocks == snapshot.num_blocks - 1

    for worker in workers:
        assert asyncio.run(snapshot_of(worker, is_level)) < GONE_WITHIN_S
    wait_until(deployment.is_healthy, 120, "a new router serves")
    assert deployment.tokens(PROMPTS[1], **PARAMETERS) == expected[1]


def _try(served: Served, prompt: list[int]) -> None:
    try:
        served.tokens(prompt, **{**PARAMETERS, "max_tokens": 200})
    except Exception:  # The router is killed under it: any error is right.
        return
