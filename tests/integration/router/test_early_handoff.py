"""Decode is asked when prefill begins: what it then does, and what ends before it comes to that."""

import asyncio
from typing import Any

import pytest

from cluster.errors import WorkerLost
from cluster.messages import Decode, Prefill
from cluster.names import Stage
from router.flow import GenerateRequest
from router.records import Outcome, PromptTokens
from tests.integration.fake_worker import Plan
from tests.integration.router.pools import DECODE_SAMPLES, QUICK_S, Pools, causes, placements
from tests.waiting import until

PREFILL_SAMPLES: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2}
HANG = Plan("hang", 0)


def early(pools: Pools) -> GenerateRequest:
    return pools.request(sampling=PREFILL_SAMPLES)


def asked(pools: Pools, name: str) -> list[tuple[bool, int | None]]:
    """Return of each attempt whether the first token was awaited, and which one was known."""
    streams = [each for each in pools[name].requests if isinstance(each, Decode)]
    return [(stream.awaits_token, stream.first_token) for stream in streams]


@pytest.mark.parametrize("sampling", [PREFILL_SAMPLES, DECODE_SAMPLES])
async def test_decode_is_asked_while_the_prompt_is_computed(sampling: dict[str, Any]) -> None:
    async with Pools(begins=True) as pools:
        pools["p0"].gate.clear()
        request = pools.request(sampling=sampling)
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        assert pools.record(request).stage is Stage.PREFILL
        assert pools["p0"].cancelled == []
        pools["p0"].gate.set()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        is_early = sampling is PREFILL_SAMPLES
        assert asked(pools, "d0") == [(is_early, None)]
        (decode,), (prefill,) = pools["d0"].requests, pools["p0"].requests
        assert isinstance(decode, Decode) and isinstance(prefill, Prefill)
        assert decode.offer is not None and decode.offer.handoff_id == prefill.handoff_id
        expected = PromptTokens(100) if is_early else PromptTokens(99, recomputed=1)
        assert pools.record(request).prompt_tokens == expected
        await until(lambda: pools["p0"].cancelled == ["r0.1"])


async def test_a_first_token_that_ends_the_request_takes_decode_back() -> None:
    async with Pools(begins=True) as pools:
        pools["p0"].default = Plan("stop")
        pools["d0"].default = HANG
        request = early(pools)
        (only,) = await pools.collect(request)
        assert only.token_ids == (0,)
        await until(lambda: pools["d0"].cancelled == ["r0.1"])
        assert pools.record(request).outcome is Outcome.STOP


@pytest.mark.parametrize("end", ["fail:handoff", "fail:engine", "reject"])
async def test_decode_failing_meanwhile_is_a_setback_of_decodes(end: str) -> None:
    async with Pools(1, 2, begins=True) as pools:
        pools["d0"].default = Plan(end)
        record = await pools.answered(early(pools))
        cause = {"fail:handoff": "handoff", "fail:engine": "decode", "reject": "decode"}[end]
        kind = "refused" if end == "reject" else "failed"
        assert causes(record) == [f"{cause}_{kind}", None]
        # The token that the client has is known to the second one before it begins.
        assert asked(pools, "d0") + asked(pools, "d1") == [(True, None), (False, 0)]


async def test_prefill_failing_meanwhile_takes_decode_back() -> None:
    async with Pools(2, 1, begins=True) as pools:
        pools["p0"].default = Plan("fail:engine")
        pools["d0"].plans.append(HANG)
        record = await pools.answered(early(pools))
        assert causes(record) == ["prefill_failed", None]
        assert placements(record) == [("p0", "d0"), ("p1", "d0")]
        assert asked(pools, "d0") == [(True, None), (True, None)]
        await until(lambda: "r0.1" in pools["d0"].cancelled)


async def test_a_prefill_worker_that_dies_computing_takes_decode_back() -> None:
    async with Pools(2, 1, QUICK_S, begins=True) as pools:
        pools["p0"].default = HANG
        pools["d0"].plans.append(HANG)
        request = early(pools)
        task = pools.start(request)
        await until(lambda: pools["d0"].requests)
        await pools["p0"].die()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        assert causes(pools.record(request)) == ["prefill_lost", None]


async def test_a_decode_worker_lost_as_prefill_begins_is_not_prefills_fault() -> None:
    async with Pools(1, 2, begins=True) as pools:
        pools["p0"].gate.clear()
        pools["d0"].default = HANG
        request = early(pools)
        task = pools.start(request)
        # Before it is asked or just after.
        await until(lambda: pools["p0"].requests)
        pools.membership.link(pools["d0"].worker_id).lose("for the test")
        pools["p0"].gate.set()
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        assert causes(pools.record(request)) == ["decode_lost", None]


async def test_a_client_that_leaves_meanwhile_frees_both_sides() -> None:
    async with Pools(begins=True) as pools:
        pools["p0"].gate.clear()
        task = pools.start(early(pools))
        await until(lambda: pools["d0"].requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: pools["p0"].cancelled == pools["d0"].cancelled == ["r0.1"])


async def test_a_decode_worker_that_dies_after_the_second_token_ends_the_stream() -> None:
    async with Pools(1, 2, QUICK_S, begins=True) as pools:
        pools["d0"].default = Plan("hang", 2)
        stream = pools.flow.serve(early(pools))
        assert [(await anext(stream)).token_ids for _ in range(2)] == [(0,), (1,)]
        await pools["d0"].die()
        with pytest.raises(WorkerLost):
            await anext(stream)
        assert pools["d1"].requests == []
