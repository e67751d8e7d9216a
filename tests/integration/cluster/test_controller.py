"""The controller over simulated workers in this process: real sockets, real hand-offs, no Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cluster.config import TandemConfig, parse_config
from cluster.controller import Controller
from cluster.controller_store import ControllerStore
from cluster.names import WorkerId
from cluster.reconfigure import InForce
from cluster.worker_spec import Parts
from deploy.engines import AUTOSCALER, ENGINES, ROLES
from tests.integration.cluster.local_workers import CORES, Host, MemoryStore
from tests.waiting import until

LOCAL = "tests.integration.cluster.local_workers"
DEAF = f"{LOCAL}:deaf_engine"


def config(**changes: Any) -> TandemConfig:
    document: dict[str, Any] = {
        "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
        "simulated": {"decode_step_s": 0.001},
        "router": {"worker_timeout_s": 1.5},
    }
    return parse_config({**document, **changes})


@asynccontextmanager
async def running(
    settings: TandemConfig, host: Host, engine: str = ENGINES["simulated"]
) -> AsyncIterator[Controller]:
    store = ControllerStore(MemoryStore(), "test")
    controller = Controller(settings, Parts(engine, ROLES, AUTOSCALER), host, store, "127.0.0.1")
    loop = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        await controller.drain_and_stop()
        await loop
    assert host.alive == []
    assert controller.workers() == []


def listed(controller: Controller) -> set[str]:
    return {entry.worker_id for entry in controller.workers()}


async def test_both_pools_come_up_and_each_worker_has_its_own_cores() -> None:
    host = Host()
    async with running(config(prefill={"workers": 2}, decode={"workers": 2}), host) as controller:
        assert controller.health()[0] is False
        await until(lambda: len(controller.workers()) == 4)
        assert controller.health() == (True, "serving")
        status = controller.status()
        assert sorted(core for w in status["workers"] for core in w["cpus"]) == list(CORES)
        assert {entry.node for entry in controller.workers()} == {"node-1"}
        assert not status["failing"] and status["failed_proofs"] == {}


async def test_a_handoff_that_moves_nothing_keeps_both_off_the_list() -> None:
    host = Host()
    async with running(config(), host, DEAF) as controller:
        await until(lambda: controller.status()["failed_proofs"])
        is_healthy, reason = controller.health()
        assert not is_healthy
        assert "prefill-1 -> decode-1: 0 of 39 prompt tokens arrived" in reason
        assert controller.workers() == []


async def test_workers_of_two_layouts_serve_side_by_side() -> None:
    settings = config(prefill={"workers": 2}, decode={"workers": 2})
    async with running(settings, Host(), f"{LOCAL}:uneven_engine") as controller:
        await until(lambda: len(controller.workers()) == 4)
        layouts = {
            entry.worker_id: entry.layout.facts["block_size"] for entry in controller.workers()
        }
        assert layouts == {
            "prefill-1": "16",
            "decode-1": "16",
            "prefill-2": "32",
            "decode-2": "32",
        }
        status = controller.status()
        assert status["refused_pairs"] == {
            "prefill-1->decode-2": "block_size is 16 on prefill-1, 32 on decode-2",
            "prefill-2->decode-1": "block_size is 32 on prefill-2, 16 on decode-1",
        }
        assert status["failed_proofs"] == {}, "nobody tried such a pair"


async def test_a_worker_that_fits_nobody_never_serves_and_the_others_do() -> None:
    settings, host = config(decode={"workers": 2}), Host()
    async with running(settings, host, f"{LOCAL}:odd_decode_engine") as controller:
        await until(lambda: "decode" in controller.status()["failed_starts"])
        # What follows is about those that serve: no third one comes up while the test ends.
        host.errors += [RuntimeError("enough")] * 9
        reason = controller.status()["failed_starts"]["decode"]
        assert reason == "it fits no peer: block_size is 32 on decode-2, 16 on prefill-1"
        await until(lambda: listed(controller) == {"prefill-1", "decode-1"})
        assert controller.health() == (True, "serving")
        status = controller.status()
        assert not status["failing"] and status["failed_proofs"] == {}
        events = [event for _, event in status["events"]]
        assert any("is not paired: block_size is" in event for event in events)
        assert f"decode-2 is stopped: {reason}" in events


async def test_without_warm_up_such_workers_are_listed() -> None:
    async with running(config(cluster={"warmup": False}), Host(), DEAF) as controller:
        await until(lambda: len(controller.workers()) == 2)


async def test_a_dead_worker_leaves_the_list_at_once_and_is_replaced() -> None:
    host = Host()
    async with running(config(), host) as controller:
        await until(lambda: len(controller.workers()) == 2)
        host.launched[WorkerId("prefill-1")].kill()
        await until(lambda: "prefill-1" not in listed(controller), timeout_s=0.5)
        is_healthy, reason = controller.health()
        assert not is_healthy and "no warm prefill worker" in reason
        assert "prefill-1: its process ended" in reason
        await until(lambda: listed(controller) == {"prefill-2", "decode-1"})
        assert controller.status()["failed_starts"] == {}


async def test_a_silent_worker_is_dropped_and_replaced() -> None:
    host = Host()
    async with running(config(), host) as controller:
        await until(lambda: len(controller.workers()) == 2)
        await host.launched[WorkerId("decode-1")].fall_silent()
        await until(lambda: listed(controller) == {"prefill-1", "decode-2"})
        assert host.launched[WorkerId("decode-1")].is_killed


async def test_a_worker_that_fails_to_start_is_tried_again() -> None:
    host = Host(errors=[RuntimeError("no such model")])
    async with running(config(), host) as controller:
        await until(lambda: "prefill" in controller.status()["failed_starts"])
        reason = controller.status()["failed_starts"]["prefill"]
        assert reason == "prefill-1: RuntimeError: no such model"
        await until(lambda: listed(controller) == {"prefill-2", "decode-1"})


async def test_a_pool_that_keeps_failing_says_so() -> None:
    host = Host(errors=[RuntimeError("boom")] * 8)
    async with running(config(), host) as controller:
        await until(lambda: controller.status()["failing"])
        assert "boom" in controller.status()["reason"]


async def test_a_worker_that_never_gets_ready_is_given_up() -> None:
    settings = config(cluster={"start_timeout_s": 0.2})
    host = Host()
    launch = host.launch

    def launch_stuck(worker_id: WorkerId, role: Any, node_id: Any) -> Any:
        worker = launch(worker_id, role, node_id)

        async def never(*_args: Any) -> Any:
            await asyncio.Event().wait()

        worker.start = never  # type: ignore[method-assign, assignment]
        return worker

    host.launch = launch_stuck  # type: ignore[method-assign]
    async with running(settings, host) as controller:
        await until(lambda: controller.status()["failed_starts"])
        reason = controller.health()[1]
        assert "prefill-1: still starting after 0 s" in reason


@pytest.mark.parametrize("num_workers", [1, 6])
async def test_more_workers_than_cores_share_them_evenly(num_workers: int) -> None:
    host = Host()
    settings = config(prefill={"workers": num_workers}, decode={"workers": num_workers})
    async with running(settings, host) as controller:
        await until(lambda: len(controller.workers()) == 2 * num_workers, 30.0)
        used = [core for w in controller.status()["workers"] for core in w["cpus"]]
        counts = [used.count(core) for core in CORES]
        assert max(counts) - min(counts) <= 1


async def test_a_deployed_configuration_changes_what_it_can_and_refuses_the_rest() -> None:
    host = Host()
    async with running(config(), host) as controller:
        await until(lambda: len(controller.workers()) == 2)
        before = listed(controller)
        wanted = config(decode={"workers": 2}, cluster={"standby": 1})
        assert controller.reconfigure(InForce(wanted, 1.0)) == wanted
        await until(lambda: len(controller.workers()) == 3 and len(host.alive) == 4, 30.0)
        assert before < listed(controller), "those that run go on"

        other = config(decode={"workers": 1}, model={"engine": "simulated", "max_model_len": 256})
        assert controller.reconfigure(InForce(other, 2.0)) == wanted
        assert "model.max_model_len 512 -> 256" in controller.status()["refused"]
        assert controller.status()["desired"] == {"prefill": 1, "decode": 2}

        assert controller.reconfigure(InForce(config(), 1.5)) == wanted, "an older one"
        assert controller.reconfigure(InForce(config(), 3.0)) == config()
        await until(lambda: controller.status()["desired"]["decode"] == 1)
        assert controller.status()["refused"] is None
        events = [event for _, event in controller.status()["events"]]
        assert "deployed: cluster.standby 0 -> 1; decode.workers 1 -> 2" in events
