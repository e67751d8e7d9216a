"""The flow over real sockets: the seven steps, every way to end early, and the line."""

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial

import pytest

from cluster.errors import (
    DeadlineExceeded,
    Overloaded,
    RequestInvalid,
    TandemError,
    Unavailable,
    WorkerLost,
)
from cluster.messages import Decode, Prefill
from cluster.metrics import REGISTRIES
from cluster.names import Component, FinishReason, Role, Stage
from router.flow import GenerateRequest
from router.records import Outcome, PromptTokens
from tests.integration.fake_worker import KV_BYTES, Plan
from tests.integration.router.pools import DECODE_SAMPLES, Pools, causes, placements
from tests.waiting import until

HANG = Plan("hang", 0)


def metric(name: str, **labels: str) -> float:
    return REGISTRIES[Component.ROUTER].get_sample_value(f"tandem_{name}", labels) or 0.0


async def test_a_request_is_prefilled_handed_over_and_decoded() -> None:
    async with Pools() as pools:
        request = pools.request(100, cache_salt="salt", priority=3)
        tokens = await pools.collect(request)
        assert [entry.token_ids for entry in tokens] == [(0,), (1,)]
        assert tokens[-1].finish_reason is FinishReason.LENGTH
        # The client has its last token only after the room was given back.
        assert pools.is_empty
        (prefill,), (decode,) = pools["p0"].requests, pools["d0"].requests
        assert isinstance(prefill, Prefill) and isinstance(decode, Decode)
        assert prefill.prompt_token_ids == decode.prompt_token_ids == request.prompt_token_ids
        assert decode.offer is not None and decode.offer.handoff_id == prefill.handoff_id
        assert decode.sampling == DECODE_SAMPLES and prefill.sampling is None
        assert (prefill.cache_salt, prefill.priority) == (decode.cache_salt, decode.priority)
        # The prefill leg is closed when the KV cache has arrived, the decode leg has ended.
        await until(lambda: pools["p0"].cancelled == ["r0.1"])
        assert pools["d0"].cancelled == []


async def test_the_record_tells_what_happened() -> None:
    async with Pools() as pools:
        record = await pools.answered()
        assert placements(record) == [("p0", "d0")] and causes(record) == [None]
        assert (record.outcome, record.stage) == (Outcome.LENGTH, Stage.FINISHED)
        assert record.prompt_tokens == PromptTokens(transferred=99, recomputed=1)
        assert record.bytes_agree is True and record.error is None
        line = record.timeline
        assert line.queue_s is not None and line.prefill_s is not None
        assert line.transfer_s is not None and line.ttft_s is not None and line.e2e_s is not None
        assert line.queue_s + line.prefill_s + line.transfer_s == pytest.approx(line.ttft_s)
        assert line.ttft_s <= line.e2e_s and line.num_tokens == 2


async def test_metrics_follow_the_engines_counts() -> None:
    names: list[tuple[str, dict[str, str]]] = [
        ("prompt_tokens_total", {"origin": "transferred"}),
        ("prompt_tokens_total", {"origin": "recomputed"}),
        ("handoff_bytes_total", {}),
        ("handoff_mismatches_total", {}),
        ("output_tokens_total", {}),
        ("requests_total", {"outcome": "length"}),
        ("ttft_seconds_count", {}),
        ("itl_seconds_count", {}),
        ("queue_seconds_count", {}),
        ("prefill_seconds_count", {}),
        ("transfer_seconds_count", {}),
        ("e2e_seconds_count", {}),
        ("tpot_seconds_count", {}),
        ("arrived_total", {}),
        ("input_tokens_total", {}),
        ("slo_requests_total", {}),
        ("open_reservations", {}),
    ]
    before = [metric(name, **labels) for name, labels in names]
    async with Pools() as pools:
        pools["d0"].produced_bytes = KV_BYTES + 1
        record = await pools.answered()
        assert record.bytes_agree is False
    after = [metric(name, **labels) for name, labels in names]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [99, 1, KV_BYTES, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 100, 0, 0]


@pytest.mark.parametrize(("num_tokens", "local_only"), [(1, False), (100, True)])
async def test_some_prompts_are_decodes_own_to_compute(num_tokens: int, local_only: bool) -> None:
    async with Pools() as pools:
        record = await pools.answered(pools.request(num_tokens, local_only=local_only))
        assert placements(record) == [(None, "d0")] and pools["p0"].requests == []
        assert record.prompt_tokens == PromptTokens(local=num_tokens)
        assert record.bytes_agree is None and record.timeline.transfer_s is None


async def test_without_a_prefill_pool_the_prompt_is_recomputed() -> None:
    async with Pools(prefill=0) as pools:
        record = await pools.answered()
        assert placements(record) == [(None, "d0")]
        assert record.prompt_tokens == PromptTokens(recomputed=100)


async def test_requests_are_placed_on_pairs_that_fit_alone() -> None:
    async with Pools(prefill=2, decode=2) as pools:
        for name in ("p1", "d1"):
            pools[name].layout = "other"
        await pools.refresh()
        records = await asyncio.gather(*(pools.answered() for _ in range(8)))
        placed = {pair for record in records for pair in placements(record)}
        assert placed == {("p0", "d0"), ("p1", "d1")}
        pools["p1"].layout = "a third"
        await pools.refresh()
        assert placements(await pools.answered()) == [("p0", "d0")]


async def test_without_a_decode_pool_nothing_is_served() -> None:
    async with Pools(decode=0) as pools:
        request = pools.request()
        with pytest.raises(Unavailable, match="no decode worker"):
            await pools.collect(request)
        assert pools.record(request).outcome is Outcome.REJECTED


async def test_an_invalid_request_is_not_tried_again() -> None:
    async with Pools(2, 2) as pools:
        pools["p0"].default = pools["p1"].default = Plan("fail:invalid")
        request = pools.request()
        with pytest.raises(RequestInvalid, match="planned"):
            await pools.collect(request)
        assert len(pools["p0"].requests + pools["p1"].requests) == 1
        assert pools.record(request).outcome is Outcome.INVALID


async def test_an_abort_by_the_worker_is_not_taken_for_an_answer() -> None:
    async with Pools(1, 2) as pools:
        pools["d0"].default = Plan("abort")
        record = await pools.answered()
        assert causes(record) == ["decode_failed", None]
        assert placements(record)[1][1] == "d1"


# --- ending early, at every stage


async def queued(pools: Pools) -> GenerateRequest:
    pools["p0"].default = HANG
    pools.start_in_background()
    await until(lambda: pools["p0"].requests)
    return pools.request()


async def prefilling(pools: Pools) -> GenerateRequest:
    pools["p0"].default = HANG
    return pools.request()


async def transferring(pools: Pools) -> GenerateRequest:
    pools["d0"].default = HANG
    return pools.request()


async def decoding(pools: Pools) -> GenerateRequest:
    pools["d0"].default = Plan("hang", 1)
    return pools.request()


STAGES = [
    (Stage.QUEUED, queued),
    (Stage.PREFILL, prefilling),
    (Stage.TRANSFER, transferring),
    (Stage.DECODE, decoding),
]
Preparation = Callable[[Pools], Awaitable[GenerateRequest]]
at_every_stage = pytest.mark.parametrize(("stage", "prepare"), STAGES, ids=lambda v: str(v)[:8])


async def expect_cancelled_everywhere(pools: Pools, name: str) -> None:
    """Every worker that was asked hears of the end, whoever has answered by then."""
    for worker in pools.workers.values():
        for leg_id in worker.ids:
            if leg_id.startswith(f"{name}."):
                await until(partial(worker.cancelled.__contains__, leg_id))


@at_every_stage
async def test_a_client_that_goes_away_frees_everything(stage: Stage, prepare: Preparation) -> None:
    async with Pools(prefills_per_worker=1) as pools:
        request = await prepare(pools)
        task = pools.start(request)
        await pools.stage(request, stage)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pools.record(request).outcome is Outcome.CANCELLED
        await expect_cancelled_everywhere(pools, request.request_id)


@at_every_stage
async def test_a_deadline_ends_a_request_at_any_stage(stage: Stage, prepare: Preparation) -> None:
    async with Pools(prefills_per_worker=1, request_deadline_s=0.4) as pools:
        request = await prepare(pools)
        task = pools.start(request)
        await pools.stage(request, stage)
        with pytest.raises(DeadlineExceeded, match=r"0\.4 s"):
            await task
        assert pools.record(request).outcome is Outcome.DEADLINE
        await expect_cancelled_everywhere(pools, request.request_id)


@at_every_stage
async def test_a_router_that_stops_ends_requests_at_any_stage(
    stage: Stage, prepare: Preparation
) -> None:
    async with Pools(prefills_per_worker=1) as pools:
        request = await prepare(pools)
        task = pools.start(request)
        await pools.stage(request, stage)
        pools.flow.close()
        assert pools.is_empty
        with pytest.raises(Unavailable, match="stopping"):
            await task
        await expect_cancelled_everywhere(pools, request.request_id)
        with pytest.raises(Unavailable, match="stopping"):
            await pools.collect()


async def test_a_reader_that_stalls_past_the_deadline_holds_nothing() -> None:
    async with Pools(request_deadline_s=0.3) as pools:
        pools["d0"].default = Plan("hang", 3)
        request = pools.request()
        async with aclosing(pools.flow.serve(request)) as stream:
            await anext(stream)
            # Nobody asks for the next token; the others have arrived.
            await until(lambda: pools.is_empty)
            await expect_cancelled_everywhere(pools, request.request_id)
            assert pools.record(request).outcome is Outcome.DEADLINE
            with pytest.raises(DeadlineExceeded):
                await anext(stream)


async def test_closing_the_stream_says_that_the_client_has_all_it_wants() -> None:
    async with Pools() as pools:
        pools["d0"].default = Plan("hang", 1)
        request = pools.request()
        async with aclosing(pools.flow.serve(request)) as stream:
            await anext(stream)
        assert pools.record(request).outcome is Outcome.STOP and pools.is_empty
        await expect_cancelled_everywhere(pools, request.request_id)


async def test_a_stream_that_is_forgotten_frees_everything() -> None:
    async with Pools() as pools:
        pools["d0"].default = Plan("hang", 1)
        stream = pools.flow.serve(pools.request())
        await anext(stream)
        del stream
        gc.collect()
        await until(lambda: pools.is_empty)
        await expect_cancelled_everywhere(pools, "r0")


async def test_a_stream_that_is_never_read_never_began() -> None:
    async with Pools() as pools:
        await pools.flow.serve(pools.request()).aclose()
        assert pools["p0"].requests == []


async def test_leaving_after_the_last_token_is_not_a_cancellation() -> None:
    async with Pools() as pools:
        request = pools.request()
        async with aclosing(pools.flow.serve(request)) as stream:
            async for tokens in stream:
                if tokens.finish_reason is not None:
                    break
        assert pools.record(request).outcome is Outcome.LENGTH
        assert pools["d0"].cancelled == []


async def test_a_request_can_be_read_by_several_tasks_in_turn() -> None:
    async with Pools(request_deadline_s=5) as pools:
        stream = pools.flow.serve(pools.request())
        first = await asyncio.create_task(anext(stream))
        second = await asyncio.create_task(anext(stream))
        assert (first.token_ids, second.token_ids) == ((0,), (1,))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


# --- the line


async def test_the_line_is_first_come_first_served() -> None:
    async with Pools(prefills_per_worker=1) as pools:
        pools["p0"].gate.clear()
        requests = [pools.request() for _ in range(8)]
        tasks = [pools.start(request) for request in requests]
        await until(lambda: pools.status["waiting"] == 7)
        assert pools["p0"].ids == ["r0.1"]
        gone = tasks.pop(3)
        gone.cancel()
        pools["p0"].gate.set()
        await asyncio.gather(*tasks)
        assert pools["p0"].ids == [f"r{index}.1" for index in range(8) if index != 3]
        assert gone.cancelled()


async def test_a_prompt_computed_frees_its_place_while_its_stream_goes_on() -> None:
    async with Pools(prefills_per_worker=1) as pools:
        pools["d0"].default = Plan("hang", 1)
        tasks = [pools.start() for _ in range(3)]
        await until(lambda: len(pools["d0"].requests) == 3)
        assert pools.status["open_reservations"] == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    async with Pools(prefills_per_worker=1, max_queued=2) as pools:
        pools["p0"].gate.clear()
        tasks = [pools.start() for _ in range(3)]
        await until(lambda: pools.status["waiting"] == 2)
        with pytest.raises(Overloaded, match=r"prefill pool is full|earlier") as caught:
            await pools.collect()
        assert caught.value.retry_after_s > 0
        pools["p0"].gate.set()
        await asyncio.gather(*tasks)


async def test_the_decode_pool_is_bounded_too() -> None:
    async with Pools(decodes_per_worker=2) as pools:
        pools["d0"].gate.clear()
        tasks = [pools.start() for _ in range(3)]
        await until(lambda: pools.status["waiting"] == 1)
        pools["d0"].gate.set()
        await asyncio.gather(*tasks)


async def test_a_waiter_cancelled_as_its_turn_comes_passes_the_turn_on() -> None:
    async with Pools(prefills_per_worker=1) as pools:
        pools["p0"].default = HANG
        tasks = [pools.start() for _ in range(3)]
        await until(lambda: pools.status["waiting"] == 2)
        # In one step: the first gives its place up to the second, which leaves unawares.
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        await until(lambda: pools["p0"].ids[-1] == "r2.1")
        assert pools.status["open_reservations"] == 1
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_new_worker_takes_waiters() -> None:
    async with Pools(prefills_per_worker=1) as pools:
        pools["p0"].default = HANG
        first, second = pools.start(), pools.start()
        await until(lambda: pools.status["waiting"] == 1)
        pools.add(pools["p0"].role, 1)
        await pools.refresh()
        await second
        assert pools["p1"].ids == ["r1.1"]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


# --- everything at once


async def one_client(pools: Pools, rng: random.Random) -> None:
    """One request; every third client goes away at some moment."""
    leaves_after_s = rng.uniform(0, 0.05) if rng.random() < 1 / 3 else None
    task = pools.start(pools.request(rng.choice([1, 100])))
    if leaves_after_s is not None:
        await asyncio.sleep(leaves_after_s)
        task.cancel()
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    if isinstance(result, list):
        assert [tokens.token_ids for tokens in result] == [(0,), (1,)]
    else:
        assert isinstance(result, asyncio.CancelledError | TandemError), repr(result)
        assert not isinstance(result, asyncio.CancelledError) or leaves_after_s is not None


async def test_whatever_happens_nothing_is_left() -> None:
    rng = random.Random(20)
    ends = ["finish"] * 6 + ["reject", "fail:engine", "fail:handoff", "abort"]
    async with Pools(2, 2, prefills_per_worker=3, decodes_per_worker=8) as pools:
        for worker in pools.workers.values():
            plans = [Plan(rng.choice(ends), 2, rng.uniform(0, 0.01)) for _ in range(300)]
            worker.plans.extend(plans)
        await asyncio.gather(*(one_client(pools, rng) for _ in range(200)))
        assert pools.is_empty
        totals = pools.status["totals"]
        assert totals["open"] == {} and sum(totals["outcomes"].values()) == 200
        assert totals["outcomes"]["length"] > 100 and totals["setbacks"]


async def test_a_worker_lost_under_load_costs_only_what_it_was_streaming() -> None:
    async with Pools(2, 2, timeout_s=1.0) as pools:
        tasks = [pools.start() for _ in range(20)]
        await until(lambda: len(pools["p0"].requests) > 2)
        await pools["p0"].die()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [result for result in results if isinstance(result, WorkerLost)]
        assert all(isinstance(result, list) for result in results), results


async def test_a_prompt_waits_for_decode_memory_or_takes_another_worker() -> None:
    async with Pools(prefill=2, decode=2) as pools:
        for name in ("d0", "d1"):
            pools[name].num_free_blocks = 6
        await until(lambda: _free_blocks(pools) == [6, 6])
        request = pools.request(num_tokens=100)
        task = pools.start(request)
        await until(lambda: pools.status["waiting"] == 1)
        assert not pools["p0"].requests and not pools["p1"].requests, "nothing to pin blocks for"
        pools["d1"].num_free_blocks = 7
        assert [tokens.token_ids for tokens in await task] == [(0,), (1,)]
        ((_, decode),) = placements(pools.record(request))
        assert decode == "d1"


def _free_blocks(pools: Pools) -> list[int]:
    snapshots = [link.snapshot for link in pools.membership.ready(Role.DECODE)]
    return [snapshot.num_free_blocks for snapshot in snapshots if snapshot is not None]
