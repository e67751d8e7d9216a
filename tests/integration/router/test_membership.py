"""Links follow the controller's list and what the workers themselves say."""

import asyncio
from dataclasses import replace

import pytest

from cluster.errors import WorkerLost
from cluster.messages import Holder
from cluster.names import HandoffId, Role, WorkerId
from tests.integration.fake_worker import Plan
from tests.integration.router.pools import QUICK_S, Pools
from tests.waiting import until


def states(pools: Pools) -> dict[object, object]:
    return {worker["worker_id"]: worker["state"] for worker in pools.membership.report()}


async def test_listed_workers_are_ready_once_they_answer() -> None:
    async with Pools(2, 1) as pools:
        assert {link.worker_id for link in pools.membership.ready(Role.PREFILL)} == {"p0", "p1"}
        assert [link.worker_id for link in pools.membership.ready(Role.DECODE)] == ["d0"]
        frozen = pools.add(Role.DECODE, 1)
        frozen.freeze()
        await pools.refresh()
        assert states(pools)["d1"] == "connecting"
        frozen.thaw()
        await until(lambda: states(pools)["d1"] == "ready")


async def test_what_pins_the_most_blocks_is_reported() -> None:
    async with Pools() as pools:
        pools["p0"].holders = (Holder(HandoffId("r7.1"), 12, 3.25),)
        shown = {"handoff_id": "r7.1", "blocks": 12, "held_s": 3.25}
        await until(lambda: pools.status["workers"][0]["holders"] == [shown])


async def test_the_same_list_again_changes_nothing() -> None:
    async with Pools() as pools:
        link = pools.membership.link(WorkerId("p0"))
        await pools.refresh()
        assert pools.membership.link(WorkerId("p0")) is link


async def test_a_worker_that_says_it_is_another_is_not_used() -> None:
    async with Pools() as pools:
        entry = pools["p0"].entry
        others = [replace(entry, worker_id=WorkerId("p7")), pools["d0"].entry]
        await pools.membership.update(others)
        await until(lambda: states(pools) == {"p7": "mismatched", "d0": "ready"})


async def test_a_role_flip_is_ready_when_the_worker_says_so() -> None:
    async with Pools(2, 1) as pools:
        link = pools.membership.link(WorkerId("p1"))
        flipped = replace(pools["p1"].entry, role=Role.DECODE)
        await pools.membership.update([pools["p0"].entry, flipped, pools["d0"].entry])
        assert states(pools)["p1"] == "mismatched"
        pools["p1"].role = Role.DECODE
        await until(lambda: len(pools.membership.ready(Role.DECODE)) == 2)
        assert pools.membership.link(WorkerId("p1")) is link


async def test_a_new_life_gets_a_fresh_link_and_ends_the_old_legs() -> None:
    async with Pools() as pools:
        pools["d0"].default = Plan("hang", 1)
        stream = pools.flow.serve(pools.request())
        await anext(stream)
        old, old_link = pools["d0"], pools.membership.link(WorkerId("d0"))
        pools.add(Role.DECODE, 0, epoch=2)
        await pools.refresh()
        with pytest.raises(WorkerLost, match="link closed"):
            await anext(stream)
        assert pools.membership.link(WorkerId("d0")) is not old_link
        await until(lambda: states(pools) == {"p0": "ready", "d0": "ready"})
        await pools.answered()
        await old.die()


async def test_a_worker_that_leaves_finishes_its_streams_and_takes_no_more() -> None:
    async with Pools(1, 2) as pools:
        pools["d0"].gate.clear()
        task = pools.start()
        await until(lambda: pools["d0"].requests)
        await pools.membership.update([pools["p0"].entry, pools["d1"].entry])
        assert states(pools) == {"p0": "ready", "d1": "ready", "d0": "leaving"}
        with pytest.raises(WorkerLost, match="has left"):
            pools.membership.link(WorkerId("d0"))
        await pools.answered()
        assert len(pools["d1"].requests) == 1
        pools["d0"].gate.set()
        assert len(await task) == 2
        await pools.membership.update([pools["p0"].entry, pools["d1"].entry])
        assert states(pools) == {"p0": "ready", "d1": "ready"}


async def test_a_worker_that_returns_while_leaving_keeps_its_link() -> None:
    async with Pools() as pools:
        pools["d0"].gate.clear()
        task = pools.start()
        await until(lambda: pools["d0"].requests)
        link = pools.membership.link(WorkerId("d0"))
        await pools.membership.update([pools["p0"].entry])
        await pools.refresh()
        assert pools.membership.link(WorkerId("d0")) is link and states(pools)["d0"] == "ready"
        pools["d0"].gate.set()
        await task


async def test_a_lost_worker_is_reported_and_its_waiters_decided_again() -> None:
    async with Pools(1, 1, QUICK_S, prefills_per_worker=1) as pools:
        pools["p0"].default = Plan("hang")
        tasks = [pools.start() for _ in range(3)]
        await until(lambda: pools.status["waiting"] == 2)
        pools["p0"].freeze()
        # All are computed by decode once nobody else is left.
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks)
        assert states(pools)["p0"] == "lost"
        assert pools["d0"].ids.count("r1.1") == 1
