"""The first token from prefill: sent at once, kept whatever happens next, once in every stream."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded, HandoffFailed, WorkerLost
from cluster.messages import Decode, Prefill, PrefillStats, Tokens
from cluster.names import FinishReason, Stage
from router.flow import GenerateRequest
from router.records import Outcome, PromptTokens
from tests.integration.fake_worker import Plan
from tests.integration.router.pools import QUICK_S, Pools, causes, placements
from tests.waiting import until

PREFILL_SAMPLES: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2}
HANG = Plan("hang", 0)


def early(pools: Pools) -> GenerateRequest:
    return pools.request(sampling=PREFILL_SAMPLES)


def legs(pools: Pools, prefill: str, decode: str) -> list[tuple[bool, int | None]]:
    """Return of each attempt whether prefill sampled, and which token decode went on from."""
    prompts = [each for each in pools[prefill].requests if isinstance(each, Prefill)]
    streams = [each for each in pools[decode].requests if isinstance(each, Decode)]
    sampled = [prompt.sampling is not None for prompt in prompts]
    return list(zip(sampled, (stream.first_token for stream in streams), strict=True))


async def test_the_first_token_does_not_wait_for_the_handoff() -> None:
    async with Pools() as pools:
        pools["d0"].gate.clear()
        request = early(pools)
        async with aclosing(pools.flow.serve(request)) as stream:
            first = await anext(stream)
            assert first.token_ids == (0,) and first.finish_reason is None
            assert first.stats == PrefillStats(100, 100, 0, 0)
            rest = asyncio.create_task(anext(stream))
            await pools.stage(request, Stage.TRANSFER)
            await until(lambda: pools["d0"].requests)
            assert pools["p0"].cancelled == [], "its blocks are still to be pulled"
            pools["d0"].gate.set()
            last = await rest
            assert (last.token_ids, last.finish_reason) == ((1,), FinishReason.LENGTH)
        (prefill,), (decode,) = pools["p0"].requests, pools["d0"].requests
        assert isinstance(prefill, Prefill) and prefill.sampling == PREFILL_SAMPLES
        assert isinstance(decode, Decode) and decode.first_token == 0
        assert decode.sampling == PREFILL_SAMPLES
        assert decode.prompt_token_ids == request.prompt_token_ids
        record = pools.record(request)
        assert record.prompt_tokens == PromptTokens(transferred=100)
        line = record.timeline
        assert line.ttft_s is not None and line.transfer_s is not None
        assert line.num_tokens == 2 and line.max_gap_s == pytest.approx(line.transfer_s, abs=0.01)


@pytest.mark.parametrize("sampling", [{"logprobs": 0}, {"seed": 0}, {"repetition_penalty": 1.1}])
async def test_where_sampling_does_not_allow_it_decode_samples(sampling: dict[str, Any]) -> None:
    async with Pools() as pools:
        request = pools.request(sampling={**PREFILL_SAMPLES, **sampling})
        assert (await pools.answered(request)).prompt_tokens == PromptTokens(99, recomputed=1)
        assert legs(pools, "p0", "d0") == [(False, None)]


async def test_a_first_token_that_ends_the_request_is_handed_to_nobody() -> None:
    async with Pools() as pools:
        pools["p0"].default = Plan("stop")
        request = early(pools)
        (only,) = await pools.collect(request)
        assert (only.token_ids, only.finish_reason) == ((0,), FinishReason.STOP)
        assert pools["d0"].requests == [] and pools["p0"].cancelled == []
        record = pools.record(request)
        assert (record.outcome, record.prompt_tokens) == (Outcome.STOP, None)
        assert record.timeline.ttft_s is not None and record.timeline.transfer_s is None


async def test_a_stop_string_in_the_first_token_leaves_nothing_to_hand_over() -> None:
    async with Pools() as pools:
        request = early(pools)
        async with aclosing(pools.flow.serve(request)) as stream:
            await anext(stream)
        await until(lambda: pools["p0"].cancelled == ["r0.1"])
        assert pools["d0"].requests == []
        assert pools.record(request).outcome is Outcome.STOP


async def test_after_a_failed_handoff_the_first_token_is_kept() -> None:
    async with Pools() as pools:
        pools["d0"].plans.append(Plan("fail:handoff"))
        record = await pools.answered(early(pools))
        assert causes(record) == ["handoff_failed", None]
        assert legs(pools, "p0", "d0") == [(True, 0), (False, 0)]
        assert record.prompt_tokens == PromptTokens(transferred=100)


async def test_the_last_resort_goes_on_from_the_first_token_too() -> None:
    async with Pools() as pools:
        pools["d0"].plans.extend([Plan("fail:handoff")] * 2)
        record = await pools.answered(early(pools))
        assert placements(record)[-1] == (None, "d0")
        assert record.prompt_tokens == PromptTokens(recomputed=100)
        assert [each.first_token for each in pools["d0"].requests if isinstance(each, Decode)] == [
            0,
            0,
            0,
        ]


async def test_a_dead_prefill_worker_costs_no_token() -> None:
    async with Pools(2, 1, QUICK_S) as pools:
        pools["d0"].plans.append(HANG)
        request = early(pools)
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        await pools["p0"].die()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        assert causes(pools.record(request)) == ["handoff_failed", None]
        assert [each.sampling for each in pools["p1"].requests if isinstance(each, Prefill)] == [
            None
        ]


async def test_a_decode_worker_that_dies_before_the_second_token_is_replaced() -> None:
    async with Pools(1, 2, QUICK_S) as pools:
        pools["d0"].default = HANG
        request = early(pools)
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        await pools["d0"].die()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        assert causes(pools.record(request)) == ["decode_lost", None]


async def test_a_decode_worker_that_dies_after_the_second_token_ends_the_stream() -> None:
    async with Pools(1, 2, QUICK_S) as pools:
        pools["d0"].default = Plan("hang", 2)
        stream = pools.flow.serve(early(pools))
        assert [(await anext(stream)).token_ids for _ in range(2)] == [(0,), (1,)]
        await pools["d0"].die()
        with pytest.raises(WorkerLost):
            await anext(stream)
        assert pools["d1"].requests == []


async def test_without_recovery_a_failed_handoff_ends_the_stream() -> None:
    async with Pools(recovery="none") as pools:
        pools["d0"].default = Plan("fail:handoff")
        stream = pools.flow.serve(early(pools))
        assert (await anext(stream)).token_ids == (0,)
        with pytest.raises(HandoffFailed):
            await anext(stream)


async def test_a_client_that_leaves_between_the_first_two_tokens_frees_both_sides() -> None:
    async with Pools() as pools:
        pools["d0"].default = HANG
        request = early(pools)
        task = pools.start(request)
        await pools.stage(request, Stage.TRANSFER)
        await until(lambda: pools["d0"].requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: pools["p0"].cancelled == pools["d0"].cancelled == ["r0.1"])
        assert pools.record(request).outcome is Outcome.CANCELLED


async def test_a_deadline_between_the_first_two_tokens_asks_nobody_for_more() -> None:
    async with Pools(request_deadline_s=0.3) as pools:
        request = early(pools)
        async with aclosing(pools.flow.serve(request)) as stream:
            await anext(stream)
            await until(lambda: pools.record(request).outcome is Outcome.DEADLINE)
            assert pools.is_empty
            with pytest.raises(DeadlineExceeded):
                await anext(stream)
        assert pools["d0"].requests == []
        await until(lambda: pools["p0"].cancelled == ["r0.1"])


async def test_tokens_nobody_asked_prefill_for_are_no_answer() -> None:
    async with Pools() as pools:
        pools["p0"].default = Plan("stop")
        record = await pools.answered()
        assert causes(record) == ["prefill_failed", None]
        assert "answered with Tokens out of turn" in (record.attempts[0].detail or "")


async def test_every_stream_has_every_token_once_whatever_happens() -> None:
    ends = ["finish", "fail:handoff", "fail:engine", "finish", "reject", "abort"]
    async with Pools(2, 3, prefills_per_worker=4) as pools:
        for worker in pools.workers.values():
            worker.plans.extend(Plan(ends[index % 6]) for index in range(60))

        async def one() -> list[Tokens] | BaseException:
            task = pools.start(early(pools))
            return (await asyncio.gather(task, return_exceptions=True))[0]

        answers = await asyncio.gather(*(one() for _ in range(60)))
        whole = [answer for answer in answers if isinstance(answer, list)]
        assert all([t.token_ids for t in answer] == [(0,), (1,)] for answer in whole)
        assert len(whole) > 30
