"""Workers forked from a node's template: they start warm, compute, and end when they should."""

import asyncio
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq.asyncio

from cluster import config as tree
from cluster.config import parse_config
from cluster.errors import StartFailed, WorkerLost
from cluster.messages import Decode, Tokens
from cluster.names import RequestId, Role, RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets
from cluster.worker_process import WorkerProcess
from cluster.worker_spec import WorkerSpec
from deploy.engines import ENGINES, ROLES
from deploy.processes import child_environment, end_marked, find_marked
from tests.waiting import until, wait_for

MARK = f"template-test:{secrets.token_hex(8)}"
GONE_WITHIN_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def deployment() -> Iterator[None]:
    """All here run as one deployment whose template every test after the first finds warm."""
    if not (tree.BUNDLED_MODEL / "model.safetensors").exists():
        pytest.skip(f"{tree.BUNDLED_MODEL} has no weights; train it with deploy.models.train")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in child_environment(MARK).items():
            patch.setenv(name, value)
        yield
        end_marked(MARK, grace_s=0.0)


def worker_process(
    cores: tuple[int, ...] = (0,), path: Path = tree.BUNDLED_MODEL, kv_cache_gib: float = 0.125
) -> WorkerProcess:
    section = {"path": str(path), "max_model_len": 2048, "kv_cache_gib": kv_cache_gib}
    config = parse_config({"model": {**section, "dtype": "float32"}})
    worker_id = WorkerId(f"w-{secrets.token_hex(4)}")
    spec = WorkerSpec(worker_id, Role.DECODE, ENGINES["vllm"], ROLES, config, cores, "127.0.0.1")
    return WorkerProcess(spec, "node")


def marked() -> dict[str, psutil.Process]:
    """Return the deployment's processes by what they are; the trackers of shared memory apart."""
    found: dict[str, psutil.Process] = {}
    for process_id in find_marked(MARK):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(process_id.pid)
            title = " ".join(process.cmdline())
            kinds = ("engine_template", "EngineCore", "Worker", "actor")
            found |= {kind: process for kind in kinds if kind in title}
    return found


def is_only_the_template_left() -> bool:
    return set(marked()) <= {"engine_template"}


async def stop(process: WorkerProcess) -> None:
    await process.stop()
    await process.run()


async def answer(entry: WorkerEntry, num_prompt_tokens: int) -> list[int]:
    """Return the tokens the worker makes of a prompt that it prefills itself."""
    context: Any = zmq.asyncio.Context()
    link = WorkerLink(
        Sockets(context), RouterId("r"), entry.worker_id, entry.endpoint, timeout_s=30.0
    )
    prompt = tuple(range(300, 300 + num_prompt_tokens))
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    token_ids: list[int] = []
    try:
        with link.open(Decode(RequestId("q"), prompt, sampling, None, None, 0)) as leg:
            while len(token_ids) < sampling["max_tokens"]:
                message = await leg.receive()
                assert isinstance(message, Tokens), message
                token_ids += message.token_ids
    finally:
        await link.close()
        context.destroy(linger=0)
    return token_ids


async def test_two_first_workers_share_one_template_and_its_forks_compute() -> None:
    """The second has two threads: libgomp's pool starts in the fork and nothing hangs."""
    processes = worker_process((0,)), worker_process((0, 1))
    entries = await asyncio.gather(*(process.start() for process in processes))
    titles = [" ".join(psutil.Process(p.pid).cmdline()) for p in find_marked(MARK)]
    assert sum("engine_template" in title for title in titles) == 1
    assert sum("EngineCore" in title for title in titles) == 2
    assert marked()["engine_template"].num_threads() == 1
    first, second = [await answer(entry, 1500) for entry in entries]
    assert first == second
    for process in processes:
        await stop(process)
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_a_worker_is_pinned_where_its_specification_says() -> None:
    core = max(os.sched_getaffinity(0))
    process = worker_process((core,))
    await process.start()
    engine_worker = marked()["Worker"]
    threads = [thread.id for thread in engine_worker.threads()]
    assert all(os.sched_getaffinity(thread) == {core} for thread in threads)
    await stop(process)


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.5, 0.8, None])
async def test_a_lost_actor_takes_everything_along(after_s: float | None) -> None:
    """At any point of the start too, where the engine has no guard of its own yet."""
    process = worker_process()
    if after_s is None:
        await process.start()
    else:
        await process.fork()
        await asyncio.sleep(after_s)
    process._close()
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


@pytest.mark.parametrize("victim", ["actor", "EngineCore", "Worker"])
async def test_the_actor_learns_of_a_lost_process(victim: str) -> None:
    process = worker_process()
    await process.start()
    marked()[victim].kill()
    with pytest.raises(WorkerLost):
        await asyncio.wait_for(process.run(), GONE_WITHIN_S)
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_stopping_a_worker_that_still_starts_leaves_nothing() -> None:
    process = worker_process()
    await process.fork()
    starting = asyncio.create_task(process._receive())
    await asyncio.sleep(0.3)
    await process.stop()
    assert await asyncio.wait_for(starting, GONE_WITHIN_S) is None
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_what_an_engine_fails_with_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartFailed, match=r"\w+Error: .*\w"):
        await worker_process(path=tmp_path).start()
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_what_an_engine_process_fails_with_is_said_and_not_where_to_look(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The cause is known to a process below the one that the actor speaks to."""
    with pytest.raises(StartFailed, match="ValueError: No available memory for the cache"):
        await worker_process(kv_cache_gib=0.0001).start()
    assert "See root cause above" in capfd.readouterr().err
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_the_last_line_is_said_of_a_process_that_is_killed_while_it_starts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    process = worker_process()
    starting = asyncio.create_task(process.start())
    await until(lambda: "EngineCore" in marked(), 30.0)
    os.write(2, b"(EngineCore pid=1) out of memory\n")
    marked()["actor"].kill()
    with pytest.raises(StartFailed, match="ended while the engine started; the last it wrote: "):
        await starting
    wait_for(is_only_the_template_left, GONE_WITHIN_S)


async def test_garbage_is_answered_and_the_template_goes_on() -> None:
    name = worker_process()._name
    pid = marked()["engine_template"].pid
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{name}")
        stranger.send(b"{}")
        assert b"error" in stranger.recv(1 << 16)
    assert marked()["engine_template"].pid == pid


async def test_workers_outlive_a_killed_template_and_the_next_one_gets_a_new_one() -> None:
    survivor = worker_process()
    entry = await survivor.start()
    killed = marked()["engine_template"]
    killed.kill()
    wait_for(lambda: not killed.is_running() or killed.status() == "zombie", GONE_WITHIN_S)
    assert len(await answer(entry, 20)) == 8
    newcomer = worker_process()
    await newcomer.start()
    assert marked()["engine_template"].pid != killed.pid
    for process in (survivor, newcomer):
        await stop(process)


async def test_nothing_is_said_to_another_users_process_at_the_templates_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is first may have an abstract name; what a template is sent holds secrets."""
    process = worker_process()
    process._name = f"tandem-template-{secrets.token_hex(8)}"
    monkeypatch.setattr("cluster.worker_process.peer_uid", lambda _: os.getuid() + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{process._name}")
        listener.listen()
        with pytest.raises(StartFailed, match=f"user {os.getuid() + 1} listens"):
            await process.fork()
        with listener.accept()[0] as stranger:
            assert stranger.recv(1) == b""
