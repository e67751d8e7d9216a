"""What every `Engine` promises, asked of a producing and a consuming one side by side."""

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cluster.names import FinishReason, HandoffId, RequestId
from tests.contract.driven_engines import (
    FREED_WITHIN_S,
    GREEDY,
    LEASE_S,
    STALL_S,
    Engines,
    only,
    tokens_of,
)
from tests.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Nobody listens on this port; connecting to it waits without an error.
NOWHERE = "tcp://127.0.0.1:9"
# Half of what a sleeping engine would take over each, and many times what a step takes.
NUM_BESIDE, BESIDE_S = 5, 0.25


# What they say of themselves.


async def test_facts_after_start(engines: Engines) -> None:
    producer, consumer = engines.producer.facts, engines.consumer.facts
    assert producer.block_size > 0 and producer.vocab_size > 0
    assert producer.max_model_len == 1024
    assert len(producer.layout.fingerprint) == 32
    assert producer.layout == consumer.layout, "one configuration, one layout"
    assert producer.layout.facts == consumer.layout.facts
    assert producer.layout.facts["block_size"] in (str(producer.block_size), "1 * 2^n")
    assert producer.epoch != consumer.epoch, "two lives"


async def test_load_after_start(engines: Engines) -> None:
    for load, side in zip(engines.start, (engines.producer, engines.consumer), strict=True):
        assert load.num_blocks == side.facts.num_blocks
        assert 0 < load.num_free_blocks <= load.num_blocks
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert (load.num_held_blocks, load.num_held_handoffs) == (0, 0)


# Whole requests.


async def test_produce_offers_and_holds(engines: Engines) -> None:
    request = engines.producing(300)
    outputs = await engines.producer.run(request)
    facts, offer = engines.producer.facts, outputs[-1].offer
    assert outputs[-1].finish_reason is FinishReason.LENGTH and offer is not None
    # Once when it began, so that its blocks can be pulled as they come, and once held.
    assert [output.offer for output in outputs] == [offer, offer]
    assert len(tokens_of(outputs)) == 1
    assert (offer.handoff_id, offer.worker_id) == (request.produce, "prefill-0")
    assert (offer.epoch, offer.fingerprint) == (facts.epoch, facts.layout.fingerprint)
    assert offer.num_tokens == 300
    assert offer.num_blocks == -(-300 // facts.block_size)
    assert (len(offer.endpoints), offer.lease_s) == (1, LEASE_S)
    load = await engines.producer.engine.load()
    assert (load.num_held_blocks, load.num_held_handoffs) == (offer.num_blocks, 1)
    (holder,) = load.holders
    assert (holder.handoff_id, holder.num_blocks) == (offer.handoff_id, offer.num_blocks)
    assert 0 <= holder.held_s < LEASE_S
    assert load.num_free_blocks == engines.start[0].num_free_blocks - offer.num_blocks
    await engines.producer.engine.release([offer.handoff_id])


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 130, 255, 256, 257, 258, 700])
async def test_consume_generates_what_a_local_prefill_does(
    engines: Engines, num_tokens: int
) -> None:
    request, offer = await engines.produced(num_tokens)
    prompt = request.prompt_token_ids
    # Before the local one, which would leave the prompt in the consumer's prefix cache.
    pulled = await engines.consumer.run(engines.request(prompt_token_ids=prompt, consume=offer))
    local = await engines.producer.run(engines.request(prompt_token_ids=prompt))
    assert tokens_of(pulled) == tokens_of(local)
    assert len(tokens_of(pulled)) == 8
    stats = only(pulled, "stats")
    assert (stats.num_prompt_tokens, stats.num_transferred_tokens) == (num_tokens, num_tokens - 1)
    if num_tokens > 1:
        receipt = only(pulled, "receipt")
        assert receipt.num_blocks == -(-(num_tokens - 1) // engines.producer.facts.block_size)
        assert receipt.received_bytes == receipt.produced_bytes > 0


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 256, 257, 700])
async def test_consume_goes_on_from_a_first_token(engines: Engines, num_tokens: int) -> None:
    """The producer samples it as a local prefill would; the consumer says what comes next."""
    request = engines.producing(num_tokens)
    outputs = await engines.producer.run(request)
    offer, (token,) = outputs[-1].offer, tokens_of(outputs)
    prompt = request.prompt_token_ids
    assert only(outputs, "stats").num_prompt_tokens == num_tokens
    pulled = await engines.consumer.run(
        engines.request(prompt_token_ids=prompt, consume=offer, first_token=token)
    )
    local = tokens_of(await engines.producer.run(engines.request(prompt_token_ids=prompt)))
    assert [token, *tokens_of(pulled)] == local and len(local) == 8
    stats = only(pulled, "stats")
    assert (stats.num_prompt_tokens, stats.num_computed_tokens) == (num_tokens, 0)
    assert stats.num_transferred_tokens == num_tokens
    receipt = only(pulled, "receipt")
    assert receipt.num_blocks == -(-num_tokens // engines.producer.facts.block_size)
    assert receipt.received_bytes == receipt.produced_bytes > 0
    # Without a hand-off the prompt is computed, and goes on the same way.
    fresh = engines.request(num_tokens, first_token=token)
    again = await engines.consumer.run(fresh)
    stats = only(again, "stats")
    assert (stats.num_prompt_tokens, stats.num_computed_tokens) == (num_tokens, num_tokens)
    assert len(tokens_of(again)) == 7


@pytest.mark.parametrize("num_tokens", [2, 128, 129, 256, 257, 700, 1000])
@pytest.mark.parametrize("awaits_token", [True, False])
async def test_blocks_are_pulled_while_the_prompt_is_computed(
    engines: Engines, num_tokens: int, awaits_token: bool
) -> None:
    request, offer = await engines.begun(num_tokens)
    prompt = request.prompt_token_ids
    pulled = await engines.consumer.run(
        engines.request(prompt_token_ids=prompt, consume=offer, awaits_token=awaits_token)
    )
    await eventually(lambda: engines.producer.has_ended(request.request_id), 60)
    first = tokens_of(engines.producer.outputs[request.request_id])
    local = tokens_of(await engines.producer.run(engines.request(prompt_token_ids=prompt)))
    assert [*(first if awaits_token else []), *tokens_of(pulled)] == local
    stats, receipt = only(pulled, "stats"), only(pulled, "receipt")
    assert stats.num_prompt_tokens == num_tokens
    assert stats.num_transferred_tokens == num_tokens - (not awaits_token)
    assert receipt.received_bytes == receipt.produced_bytes > 0


async def test_an_abort_of_what_is_being_pulled_ends_both(engines: Engines) -> None:
    request, offer = await engines.begun(1000)
    pulling = engines.request(prompt_token_ids=request.prompt_token_ids, consume=offer)
    await engines.consumer.engine.submit(pulling)
    await engines.producer.engine.abort([request.request_id])
    await eventually(lambda: engines.consumer.has_ended(pulling.request_id), 60)
    (output,) = engines.consumer.outputs[pulling.request_id]
    assert output.finish_reason is FinishReason.ERROR
    assert "refused" in (output.handoff_error or "")


async def test_a_pull_given_up_early_leaves_the_prompt_to_its_engine(engines: Engines) -> None:
    request, offer = await engines.begun(1000)
    pulling = engines.request(prompt_token_ids=request.prompt_token_ids, consume=offer)
    await engines.consumer.engine.submit(pulling)
    await engines.consumer.engine.abort([pulling.request_id])
    # Nobody who knew of it is left: it is free as soon as it is computed.
    await eventually(lambda: engines.producer.has_ended(request.request_id), 60)
    await engines.producer.engine.release([offer.handoff_id])


async def test_what_follows_depends_on_the_first_token(engines: Engines) -> None:
    prompt = engines.request().prompt_token_ids
    answers = []
    for token in (300, 301):
        request = engines.request(prompt_token_ids=prompt, first_token=token)
        answers.append(tokens_of(await engines.consumer.run(request)))
    assert answers[0] != answers[1]


async def test_a_first_token_that_ends_the_request_leaves_nothing_held(engines: Engines) -> None:
    request = engines.producing(sampling={**GREEDY, "max_tokens": 1})
    (output,) = await engines.producer.run(request)
    assert (output.finish_reason, output.offer) == (FinishReason.LENGTH, None)
    assert output.stats is not None and len(output.token_ids) == 1
    assert await engines.producer.is_idle()


async def test_a_stop_token_first_leaves_nothing_held(engines: Engines) -> None:
    if engines.producer.facts.is_simulated:
        pytest.skip("the simulated engine stops at nothing")
    prompt = engines.request().prompt_token_ids
    first = tokens_of(await engines.producer.run(engines.request(prompt_token_ids=prompt)))[0]
    sampling = {**GREEDY, "stop_token_ids": [first], "_all_stop_token_ids": [first]}
    request = engines.producing(prompt_token_ids=prompt, sampling=sampling)
    begun, output = await engines.producer.run(request)
    assert begun.offer is not None, "it could have gone on"
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, first)
    assert (output.token_ids, output.offer) == ((first,), None)
    # Forbidden for as long as the client wants at least two.
    request = engines.producing(prompt_token_ids=prompt, sampling={**sampling, "min_tokens": 2})
    outputs = await engines.producer.run(request)
    assert tokens_of(outputs) != [first]
    await engines.producer.engine.release([HandoffId(str(request.produce))])


async def test_what_is_cached_on_decode_is_not_pulled_again(engines: Engines) -> None:
    request, offer = await engines.produced(600)
    prompt = request.prompt_token_ids
    first = await engines.consumer.run(engines.request(prompt_token_ids=prompt, consume=offer))
    _, offer = await engines.produced(prompt_token_ids=prompt)
    again = await engines.consumer.run(engines.request(prompt_token_ids=prompt, consume=offer))
    assert tokens_of(again) == tokens_of(first)
    stats = only(again, "stats")
    assert stats.num_local_cached_tokens + stats.num_transferred_tokens == 599


async def test_many_at_once(engines: Engines) -> None:
    async def one(num_tokens: int) -> bool:
        request, offer = await engines.produced(num_tokens)
        prompt = request.prompt_token_ids
        pulled = await engines.consumer.run(engines.request(prompt_token_ids=prompt, consume=offer))
        return len(tokens_of(pulled)) == 8 and only(pulled, "receipt").received_bytes > 0

    assert all(await asyncio.gather(*(one(50 + 30 * index) for index in range(12))))


# Ends. The `engines` fixture checks that every block is free again.


async def test_abort_while_waiting(engines: Engines) -> None:
    producing, plain = engines.producing(), engines.request()
    _, offer = await engines.produced()
    consuming = engines.request(consume=offer)
    await engines.producer.engine.submit(producing)
    await engines.producer.engine.submit(plain)
    await engines.producer.engine.abort([producing.request_id, plain.request_id])
    await engines.consumer.engine.submit(consuming)
    await engines.consumer.engine.abort([consuming.request_id])


async def test_abort_while_producing(engines: Engines) -> None:
    requests = [engines.producing(1000) for _ in range(4)]
    for request in requests:
        await engines.producer.engine.submit(request)
    await engines.producer.takes_blocks(engines.start[0])
    await engines.producer.engine.abort([request.request_id for request in requests])


async def test_abort_while_pulling(engines: Engines) -> None:
    request, offer = await engines.produced()
    nowhere = replace(offer, endpoints=(NOWHERE,))
    pulling = engines.request(prompt_token_ids=request.prompt_token_ids, consume=nowhere)
    await engines.consumer.engine.submit(pulling)
    await engines.consumer.takes_blocks(engines.start[1])
    await engines.consumer.engine.abort([pulling.request_id])
    await engines.consumer.frees_all(engines.start[1])
    assert pulling.request_id not in engines.consumer.outputs, "no output follows an abort"
    await engines.producer.engine.release([offer.handoff_id])


async def test_a_request_beside_a_pull_does_not_wait_for_it(engines: Engines) -> None:
    """An engine with nothing but a pull to wait for sleeps; what is submitted wakes it."""
    request, offer = await engines.produced()
    nowhere = replace(offer, endpoints=(NOWHERE,))
    pulling = engines.request(prompt_token_ids=request.prompt_token_ids, consume=nowhere)
    await engines.consumer.engine.submit(pulling)
    began = time.monotonic()
    for _ in range(NUM_BESIDE):
        await engines.consumer.run(engines.request(20, sampling={**GREEDY, "max_tokens": 1}))
    taken_s = time.monotonic() - began
    assert not engines.consumer.outputs.get(pulling.request_id), "the pull is over"
    await engines.consumer.engine.abort([pulling.request_id])
    await engines.producer.engine.release([offer.handoff_id])
    assert taken_s / NUM_BESIDE < BESIDE_S


async def test_abort_while_decoding(engines: Engines) -> None:
    request, offer = await engines.produced()
    sampling = {**GREEDY, "max_tokens": 600}
    streams = [
        engines.request(sampling=sampling),
        engines.request(
            prompt_token_ids=request.prompt_token_ids, sampling=sampling, consume=offer
        ),
    ]
    for stream in streams:
        await engines.consumer.engine.submit(stream)
    for stream in streams:
        await engines.consumer.says_something_of(stream.request_id)
    await engines.consumer.engine.abort([stream.request_id for stream in streams])
    assert not any([await engines.consumer.has_ended(stream.request_id) for stream in streams])


async def test_abort_of_what_is_not_there(engines: Engines) -> None:
    await engines.producer.engine.abort([RequestId("nobody")])
    done = engines.request(20)
    await engines.producer.run(done)
    await engines.producer.engine.abort([done.request_id])


# A name that comes again once its request has ended.


async def test_a_name_comes_again_while_its_aborted_pull_ends(engines: Engines) -> None:
    prompt = engines.request().prompt_token_ids
    (_, gone), (_, offer) = [await engines.produced(prompt_token_ids=prompt) for _ in range(2)]
    nowhere = replace(gone, endpoints=(NOWHERE,))
    pulling = engines.request(prompt_token_ids=prompt, consume=nowhere)
    await engines.consumer.engine.submit(pulling)
    await engines.consumer.takes_blocks(engines.start[1])
    await engines.consumer.engine.abort([pulling.request_id])
    pulled = await engines.consumer.run(replace(pulling, consume=offer))
    local = await engines.producer.run(engines.request(prompt_token_ids=prompt))
    assert tokens_of(pulled) == tokens_of(local) and len(tokens_of(local)) == 8
    assert only(pulled, "receipt").received_bytes > 0
    await engines.producer.engine.release([gone.handoff_id])


async def test_a_name_comes_again_while_its_blocks_are_held(engines: Engines) -> None:
    request, offer = await engines.produced()
    engines.producer.forget(request.request_id)
    again = replace(request, produce=HandoffId("again"))
    other = (await engines.producer.run(again))[-1].offer
    assert other is not None and other.handoff_id == "again"
    load = await engines.producer.engine.load()
    assert load.num_held_handoffs == 2
    assert load.num_held_blocks == offer.num_blocks + other.num_blocks
    await engines.producer.engine.release([offer.handoff_id, other.handoff_id])


async def test_a_name_comes_again_while_its_aborted_prompt_is_freed(engines: Engines) -> None:
    request, _ = await engines.begun(1000)
    prompt = request.prompt_token_ids
    await engines.producer.engine.abort([request.request_id])
    engines.producer.forget(request.request_id)
    outputs = await engines.producer.run(replace(request, produce=HandoffId("again")))
    offers = [output.offer for output in outputs]
    assert [offer.handoff_id for offer in offers if offer] == ["again", "again"]
    pulled = await engines.consumer.run(engines.request(prompt_token_ids=prompt, consume=offers[0]))
    local = await engines.producer.run(engines.request(prompt_token_ids=prompt))
    assert tokens_of(pulled) == tokens_of(local)


async def test_what_was_aborted_says_nothing_under_its_name(engines: Engines) -> None:
    for _ in range(5):
        stream = engines.request(sampling={**GREEDY, "max_tokens": 600})
        await engines.consumer.engine.submit(stream)
        await engines.consumer.says_something_of(stream.request_id)
        await engines.consumer.engine.abort([stream.request_id])
        engines.consumer.forget(stream.request_id)
        prompt = engines.request().prompt_token_ids
        again = engines.request(prompt_token_ids=prompt)
        outputs = await engines.consumer.run(replace(again, request_id=stream.request_id))
        assert tokens_of(outputs) == tokens_of(await engines.producer.run(again))


async def test_release_frees_and_may_be_repeated(engines: Engines) -> None:
    offers = [(await engines.produced())[1] for _ in range(3)]
    await engines.producer.engine.release([offer.handoff_id for offer in offers])
    await engines.producer.engine.release([offer.handoff_id for offer in offers])
    await engines.producer.engine.release([HandoffId("nobody")])
    await engines.producer.frees_all(engines.start[0])


async def test_a_lease_that_runs_out_frees(engines: Engines) -> None:
    before = (await engines.producer.engine.load()).counts
    _, offer = await engines.produced()
    await eventually(engines.producer.is_idle, LEASE_S + FREED_WITHIN_S)
    after = (await engines.producer.engine.load()).counts
    assert _grown(before, after)["handoffs_expired"] == 1
    outputs = await engines.consumer.run(engines.request(consume=offer))
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert "refused: ended" in (outputs[-1].handoff_error or "")


def _grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    return {kind: count - before.get(kind, 0) for kind, count in after.items()}


@pytest.mark.parametrize(
    ("label", "changes", "reason"),
    [
        ("a producer that is gone", {"endpoints": (NOWHERE,)}, f"no data for {STALL_S} s"),
        ("no address", {"endpoints": ()}, "has 0 ranks"),
        ("another life of the producer", {"epoch": 1}, "refused: stale_epoch"),
        ("another layout", {"fingerprint": "f" * 32}, "layout ffffffff"),
        ("a hand-off that never was", {"handoff_id": HandoffId("no")}, "refused: unknown"),
    ],
)
async def test_a_pull_that_fails_is_an_error_that_says_why(
    engines: Engines, label: str, changes: dict[str, Any], reason: str
) -> None:
    request, offer = await engines.produced()
    bad = engines.request(
        prompt_token_ids=request.prompt_token_ids, consume=replace(offer, **changes)
    )
    outputs = await engines.consumer.run(bad)
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert reason in (outputs[0].handoff_error or "")
    assert tokens_of(outputs) == []
    await engines.producer.engine.release([offer.handoff_id])
    # The engine goes on: the same prompt, prefilled where it failed.
    again = await engines.consumer.run(engines.request(prompt_token_ids=request.prompt_token_ids))
    assert len(tokens_of(again)) == 8


async def test_random_ends_leave_nothing(engines: Engines) -> None:
    """Thirty requests, a third of them cancelled at a random moment."""
    rng = random.Random(3)

    async def one(index: int) -> None:
        producing = engines.producing(rng.randint(2, 400))
        outputs = await engines.producer.run(producing)
        offer = outputs[-1].offer
        assert offer is not None
        consuming = engines.request(prompt_token_ids=producing.prompt_token_ids, consume=offer)
        await engines.consumer.engine.submit(consuming)
        if index % 3 == 0:
            await asyncio.sleep(rng.random() * 0.1)
            await engines.consumer.engine.abort([consuming.request_id])
        else:
            await eventually(lambda: engines.consumer.has_ended(consuming.request_id), 60)
            outputs = engines.consumer.outputs[consuming.request_id]
            assert len(tokens_of(outputs)) == 8
        await engines.producer.engine.release([offer.handoff_id])

    await asyncio.gather(*(one(index) for index in range(30)))
