"""What the flow does when a worker refuses, fails, dies or falls silent."""

import asyncio

import pytest

from cluster.errors import HandoffFailed, Overloaded, Unavailable, WorkerLost
from cluster.messages import Decode, Failed, Tokens
from cluster.names import RequestId
from router.records import Outcome, PromptTokens
from tests.integration.fake_worker import Plan
from tests.integration.router.pools import QUICK_S, Pools, causes, placements
from tests.waiting import until

HANG = Plan("hang", 0)
# A decode that waits for a dead prefill must have moved on within this.
MOVE_ON_S = 5.0


@pytest.mark.parametrize(
    ("end", "cause"), [("reject", "prefill_refused"), ("fail:engine", "prefill_failed")]
)
async def test_another_prefill_worker_takes_over(end: str, cause: str) -> None:
    async with Pools(2, 1) as pools:
        pools["p0"].default = Plan(end)
        record = await pools.answered()
        assert causes(record) == [cause, None]
        assert placements(record) == [("p0", "d0"), ("p1", "d0")]
        assert record.prompt_tokens == PromptTokens(transferred=99, recomputed=1)


@pytest.mark.parametrize("end", ["reject", "fail:engine"])
async def test_without_another_prefill_worker_decode_computes_the_prompt(end: str) -> None:
    async with Pools() as pools:
        pools["p0"].default = Plan(end)
        record = await pools.answered()
        assert placements(record) == [("p0", "d0"), (None, "d0")]
        assert record.prompt_tokens == PromptTokens(recomputed=100)


@pytest.mark.parametrize(
    ("end", "cause"), [("reject", "decode_refused"), ("fail:engine", "decode_failed")]
)
async def test_another_decode_worker_takes_over(end: str, cause: str) -> None:
    async with Pools(1, 2) as pools:
        pools["d0"].default = Plan(end)
        record = await pools.answered()
        assert causes(record) == [cause, None]
        assert placements(record) == [("p0", "d0"), ("p0", "d1")]
        # The KV cache held for the first is given up.
        await until(lambda: pools["p0"].cancelled == ["r0.1", "r0.2"])


async def test_refused_by_every_decode_worker_is_overload() -> None:
    async with Pools(1, 2) as pools:
        pools["d0"].default = pools["d1"].default = Plan("reject")
        request = pools.request()
        with pytest.raises(Overloaded, match="full"):
            await pools.collect(request)
        assert pools.record(request).outcome is Outcome.REJECTED
        assert causes(pools.record(request)) == ["decode_refused"] * 2


async def test_failed_by_every_decode_worker_is_that_failure() -> None:
    async with Pools(1, 1) as pools:
        pools["d0"].default = Plan("fail:engine")
        with pytest.raises(WorkerLost, match="planned engine failure"):
            await pools.collect()


async def test_a_failed_handoff_goes_to_another_pair() -> None:
    async with Pools(2, 2) as pools:
        pools["d0"].default = Plan("fail:handoff")
        record = await pools.answered()
        assert causes(record) == ["handoff_failed", None]
        assert placements(record) == [("p0", "d0"), ("p1", "d1")]


async def test_the_only_prefill_worker_is_tried_once_more_after_a_failed_handoff() -> None:
    async with Pools() as pools:
        pools["d0"].plans.append(Plan("fail:handoff"))
        record = await pools.answered()
        assert placements(record) == [("p0", "d0"), ("p0", "d0")]
        assert pools["p0"].ids == ["r0.1", "r0.2"]
        assert record.prompt_tokens == PromptTokens(transferred=99, recomputed=1)


async def test_after_two_failed_handoffs_decode_computes_the_prompt() -> None:
    async with Pools() as pools:
        pools["d0"].plans.extend([Plan("fail:handoff")] * 2)
        record = await pools.answered()
        assert placements(record) == [("p0", "d0"), ("p0", "d0"), (None, "d0")]
        assert record.prompt_tokens == PromptTokens(recomputed=100)


async def test_without_recovery_a_failed_handoff_is_the_clients_error() -> None:
    async with Pools(recovery="none") as pools:
        pools["d0"].default = Plan("fail:handoff")
        request = pools.request()
        with pytest.raises(HandoffFailed, match="planned handoff failure"):
            await pools.collect(request)
        assert pools.record(request).outcome is Outcome.ERROR
        assert len(pools["d0"].requests) == 1


async def test_attempts_are_bounded() -> None:
    async with Pools(1, 4, max_attempts=3) as pools:
        for name in ("d0", "d1", "d2", "d3"):
            pools[name].default = Plan("fail:engine")
        request = pools.request()
        with pytest.raises(WorkerLost):
            await pools.collect(request)
        assert causes(pools.record(request)) == ["decode_failed"] * 3


@pytest.mark.parametrize("num_prefill", [1, 2])
async def test_a_prefill_worker_that_dies_computing_is_replaced(num_prefill: int) -> None:
    async with Pools(num_prefill, 1, QUICK_S) as pools:
        pools["p0"].default = HANG
        request = pools.request()
        task = pools.start(request)
        await until(lambda: pools["p0"].requests)
        await pools["p0"].die()
        async with asyncio.timeout(MOVE_ON_S):
            await task
        record = pools.record(request)
        assert causes(record) == ["prefill_lost", None]
        assert placements(record)[1] == ("p1" if num_prefill == 2 else None, "d0")


@pytest.mark.parametrize("num_prefill", [1, 2])
async def test_a_decode_waiting_for_a_dead_prefill_moves_on(num_prefill: int) -> None:
    async with Pools(num_prefill, 1, QUICK_S) as pools:
        pools["d0"].plans.append(HANG)
        request = pools.request()
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        await pools["p0"].die()
        async with asyncio.timeout(MOVE_ON_S):
            await task
        record = pools.record(request)
        assert causes(record) == ["handoff_failed", None]
        assert placements(record)[1] == ("p1" if num_prefill == 2 else None, "d0")
        assert "r0.1" in pools["d0"].cancelled


async def test_a_prefill_worker_that_gives_its_blocks_up_is_noticed_at_once() -> None:
    async with Pools(2, 1) as pools:
        pools["d0"].plans.append(HANG)
        task = pools.start()
        await until(lambda: pools["d0"].requests)
        await pools["p0"].send(b"router", Failed(RequestId("r0.1"), "engine", "going away"))
        await task
        assert pools["p1"].ids == ["r0.2"]


async def test_a_prefill_worker_lost_after_the_first_token_is_not_missed() -> None:
    async with Pools(1, 1, QUICK_S) as pools:
        pools["d0"].default = Plan("finish", 2, delay_s=3 * QUICK_S)
        task = pools.start()
        await until(lambda: pools["p0"].cancelled)
        await pools["p0"].die()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]


async def test_a_decode_worker_that_dies_before_the_first_token_is_replaced() -> None:
    async with Pools(1, 2, QUICK_S) as pools:
        pools["d0"].default = HANG
        request = pools.request()
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        await pools["d0"].die()
        async with asyncio.timeout(MOVE_ON_S):
            await task
        assert causes(pools.record(request)) == ["decode_lost", None]
        assert placements(pools.record(request)) == [("p0", "d0"), ("p0", "d1")]


async def test_without_a_decode_worker_left_the_request_is_unavailable() -> None:
    async with Pools(1, 1, QUICK_S) as pools:
        pools["d0"].default = HANG
        task = pools.start()
        await until(lambda: pools["d0"].requests)
        await pools["d0"].die()
        with pytest.raises(Unavailable, match="no decode worker"):
            await task


async def test_a_stream_lost_midway_is_an_error_and_not_repeated() -> None:
    async with Pools(1, 2, QUICK_S) as pools:
        pools["d0"].default = Plan("hang", 1)
        request, seen = pools.request(), []
        stream = pools.flow.serve(request)
        seen.append((await anext(stream)).token_ids)
        await pools["d0"].die()
        with pytest.raises(WorkerLost, match="d0: silent"):
            await anext(stream)
        assert seen == [(0,)] and pools["d1"].requests == []
        assert causes(pools.record(request)) == ["decode_lost"]
        assert pools.record(request).outcome is Outcome.ERROR


async def test_late_answers_of_an_earlier_attempt_are_not_taken() -> None:
    async with Pools() as pools:
        pools["d0"].plans.extend([Plan("fail:handoff"), HANG])
        stream = pools.flow.serve(pools.request())
        reading = asyncio.create_task(anext(stream))
        await until(lambda: len(pools["d0"].requests) == 2)
        first, second = pools["d0"].requests
        assert isinstance(second, Decode) and first.request_id != second.request_id
        await pools["d0"].send(b"router", Tokens(first.request_id, (666,)))
        answer = Tokens(second.request_id, (0,))
        await pools["d0"].send(b"router", answer)
        assert await reading == answer
        await stream.aclose()


async def test_tokens_lost_on_the_way_end_the_stream_rather_than_leave_a_gap() -> None:
    async with Pools() as pools:
        pools["d0"].plans.append(HANG)
        request = pools.request()
        stream = pools.flow.serve(request)
        reading = asyncio.create_task(anext(stream))
        await until(lambda: len(pools["d0"].requests) == 1)
        (leg,) = pools["d0"].requests
        await pools["d0"].send(b"router", Tokens(leg.request_id, (0,)))
        assert (await reading).token_ids == (0,)
        await pools["d0"].send(b"router", Tokens(leg.request_id, (2,), num_before=2))
        with pytest.raises(WorkerLost, match="lost on the way: 1 received, 2 sent"):
            await anext(stream)
        assert causes(pools.record(request)) == ["decode_cut"]


@pytest.mark.parametrize(("name", "cause"), [("p0", "prefill_cut"), ("d0", "decode_cut")])
async def test_after_a_cut_the_only_worker_is_asked_again(name: str, cause: str) -> None:
    async with Pools() as pools:
        pools[name].plans.append(HANG)
        request = pools.request()
        task = pools.start(request)
        await until(lambda: pools[name].requests)
        # What it would do after a silence; the router hears of it as of a loss.
        pools[name].socket.forget(b"router")
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        assert causes(pools.record(request)) == [cause, None]


async def test_a_silent_worker_that_comes_back_serves_again() -> None:
    async with Pools(1, 1, QUICK_S) as pools:
        pools["p0"].freeze()
        await until(lambda: len(pools.membership.ready_workers()) == 1)
        assert placements(await pools.answered()) == [(None, "d0")]
        pools["p0"].thaw()
        await until(lambda: len(pools.membership.ready_workers()) == 2)
        assert placements(await pools.answered()) == [("p0", "d0")]
