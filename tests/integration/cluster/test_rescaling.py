"""The controller changes pools and is itself replaced: simulated workers, no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from cluster.config import TandemConfig, parse_config
from cluster.controller import Controller
from cluster.controller_store import ControllerStore
from cluster.names import Role, WorkerId
from cluster.worker_spec import Parts
from cluster.worker_state import WorkerState
from deploy.engines import AUTOSCALER, ENGINES, ROLES
from tests.integration.cluster.local_workers import Host, MemoryStore
from tests.waiting import until

PARTS = Parts(ENGINES["simulated"], ROLES, AUTOSCALER)


def config(
    prefill: int = 1, decode: int = 1, standby: int = 0, soft_in_s: float = 0.2
) -> TandemConfig:
    return parse_config(
        {
            "cluster": {"standby": standby},
            "prefill": {"workers": prefill},
            "decode": {"workers": decode},
            "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
            "simulated": {"decode_step_s": 0.001},
            "autoscaler": {"soft_in_s": soft_in_s},
        }
    )


@asynccontextmanager
async def controller_of(
    settings: TandemConfig, host: Host, store: MemoryStore
) -> AsyncIterator[Controller]:
    """Run a controller that dies at the end of the block, without a word to its workers."""
    controller = Controller(settings, PARTS, host, ControllerStore(store, "test"), "127.0.0.1")
    loop = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await controller._workforce.let_go()


@asynccontextmanager
async def running(settings: TandemConfig, host: Host) -> AsyncIterator[Controller]:
    async with controller_of(settings, host, MemoryStore()) as controller:
        await until(lambda: sizes(controller) == wanted(settings))
        yield controller
        await controller.drain_and_stop()
    assert host.alive == []


def wanted(settings: TandemConfig) -> dict[Role, int]:
    return {Role.PREFILL: settings.prefill.workers, Role.DECODE: settings.decode.workers}


def sizes(controller: Controller) -> dict[Role, int]:
    roles = [entry.role for entry in controller.workers()]
    return {role: roles.count(role) for role in Role}


def listed(controller: Controller) -> set[str]:
    return {entry.worker_id for entry in controller.workers()}


def states(controller: Controller) -> dict[str, str]:
    return {worker["worker_id"]: worker["state"] for worker in controller.status()["workers"]}


def pools(prefill: int, decode: int) -> Mapping[Role, int]:
    return {Role.PREFILL: prefill, Role.DECODE: decode}


async def test_pools_grow_and_shrink_by_hand() -> None:
    host = Host()
    async with running(config(), host) as controller:
        controller.scale(pools(2, 3))
        await until(lambda: sizes(controller) == pools(2, 3))
        controller.scale(pools(1, 1))
        await until(lambda: sizes(controller) == pools(1, 1))
        await until(lambda: len(states(controller)) == 2)
        assert len(host.alive) == 2


async def test_a_worker_taken_out_is_restored_rather_than_replaced() -> None:
    host = Host()
    async with running(config(decode=2, soft_in_s=60.0), host) as controller:
        before = listed(controller)
        controller.scale(pools(1, 1))
        await until(lambda: "soft_out" in states(controller).values())
        assert len(host.alive) == 3
        controller.scale(pools(1, 2))
        await until(lambda: listed(controller) == before)
        assert len(host.launched) == 3


async def test_a_spare_worker_of_one_pool_becomes_one_of_the_other() -> None:
    host = Host()
    async with running(config(prefill=2), host) as controller:
        controller.scale(pools(1, 2))
        await until(
            lambda: (
                sizes(controller) == pools(1, 2) and "flipping" not in states(controller).values()
            )
        )
        assert len(host.launched) == 3, "nothing was started"


async def test_a_standby_serves_within_a_second() -> None:
    host = Host()
    async with running(config(standby=1), host) as controller:
        await until(lambda: "standby" in states(controller).values())
        (standby,) = (name for name, state in states(controller).items() if state == "standby")
        asked_at = time.monotonic()
        controller.scale(pools(2, 1))
        await until(lambda: states(controller).get(standby) == "ready", 5.0)
        assert time.monotonic() - asked_at < 1.0
        await until(lambda: "standby" in states(controller).values())


async def test_a_clock_that_is_set_back_keeps_nobody_waiting() -> None:
    host = Host()
    async with running(config(decode=2), host) as controller:
        controller.scale(pools(1, 1))
        await until(lambda: "soft_out" in states(controller).values())
        for member in controller._workforce._members.values():
            member.since += 3600.0  # what it looks like an hour before
        await until(lambda: len(states(controller)) == 2)


async def test_the_next_controller_takes_the_workers_over() -> None:
    host, store, settings = Host(), MemoryStore(), config(decode=2)
    async with controller_of(settings, host, store) as first:
        await until(lambda: sizes(first) == pools(1, 2))
        first.scale(pools(2, 2))
        await until(lambda: sizes(first) == pools(2, 2))
        before = {entry.worker_id: entry for entry in first.workers()}
    host.launched[WorkerId("decode-1")].kill()
    async with controller_of(settings, host, store) as second:
        kept = {k: v for k, v in before.items() if k != "decode-1"}
        await until(lambda: kept.items() <= {e.worker_id: e for e in second.workers()}.items())
        await until(lambda: sizes(second) == pools(2, 2))
        assert listed(second) == {*kept, "decode-3"}
        assert second.status()["epoch"] == 2
        await second.drain_and_stop()
    assert host.alive == []


async def test_an_earlier_controller_stops_acting() -> None:
    host, store, settings = Host(), MemoryStore(), config()
    async with controller_of(settings, host, store) as first:
        await until(lambda: sizes(first) == pools(1, 1))
        async with controller_of(settings, host, store) as second:
            await until(lambda: first.is_fenced)
            first.resize(pools(3, 3), "must not happen")
            second.scale(pools(1, 2))
            await until(lambda: sizes(second) == pools(1, 2))
            assert len(host.launched) == 3
            await second.drain_and_stop()


async def test_workers_that_were_starting_are_taken_over_too() -> None:
    host, store, settings = Host(start_s=0.5), MemoryStore(), config()
    async with controller_of(settings, host, store) as first:
        await until(lambda: len(host.launched) == 2 and "starting" in states(first).values())
        await until(lambda: store.get("tandem/test/workforce") is not None)
    async with controller_of(settings, host, store) as second:
        await until(lambda: sizes(second) == pools(1, 1))
        assert len(host.launched) == 2
        await second.drain_and_stop()


@pytest.mark.parametrize("state", [s for s in WorkerState if s is not WorkerState.STOPPING])
async def test_a_worker_killed_in_any_state_is_made_up_for(state: WorkerState) -> None:
    """While both pools go 1:1 -> 2:2 -> 1:1 with a standby and a change of role on the way."""
    host = Host(start_s=0.1)
    settings = config(prefill=2, standby=1, soft_in_s=0.3)
    async with running(settings, host) as controller:
        victims = killing(controller, host, state)
        for target in (pools(1, 2), pools(3, 3), pools(1, 1), pools(1, 2)):
            controller.scale(target)
            await until(lambda target=target: sizes(controller) == target)  # type: ignore[misc]
            await until(lambda: settled(controller))
        victims.cancel()
        killed = await asyncio.gather(victims, return_exceptions=True)
        assert isinstance(killed[0], asyncio.CancelledError)
        if state not in (WorkerState.PENDING, WorkerState.HELD):  # too brief to be sure of
            assert any(worker.is_killed for worker in host.launched.values())


def killing(controller: Controller, host: Host, state: WorkerState) -> asyncio.Task[None]:
    """Kill the first worker seen in `state` after each change of size."""

    async def kill() -> None:
        last_sizes = None
        while True:
            wanted_now = controller.status()["desired"]
            for name, its_state in states(controller).items():
                if its_state == state and wanted_now != last_sizes:
                    last_sizes = wanted_now
                    host.launched[WorkerId(name)].kill()
            await asyncio.sleep(0.002)

    return asyncio.create_task(kill())


def settled(controller: Controller) -> bool:
    passing = {"pending", "starting", "warming", "flipping", "draining", "soft_out", "stopping"}
    return not passing & set(states(controller).values())
