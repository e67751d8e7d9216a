"""Blocks that leave while their prompt is computed: when, which, and what takes them back."""

import pytest

from cluster.names import HandoffId
from kv_transfer.handoff import ProducerEvent
from kv_transfer.producer import Hold
from kv_transfer.progress import Growth
from tests.unit.kv_transfer.pair import LEASE_S, STALL_S, Pair, assert_failed, assert_untouched

THEIRS, OURS = (3, 9, 4, 20), (11, 2, 30, 5)
H = HandoffId("h")
TOKEN = 77
KEEP_S = STALL_S / 3


def opened(**settings: int) -> Pair:
    """Return a pair with an open prompt, and a pull that has asked for all it may."""
    pair = Pair(**{"chunk_bytes": 32, "window": 8, **settings})  # type: ignore[arg-type]
    pair.producer.open(H, "key-h", 1)
    pair.pull(OURS, awaits_token=True)
    pair.settle()
    return pair


def grow(pair: Pair, *block_ids: int, dt: float = 0.0) -> None:
    pair.producer.grow(Growth(H, (block_ids,)))
    pair.tick(dt)
    pair.settle()


def complete(pair: Pair, *block_ids: int, dt: float = 0.0) -> None:
    pair.producer.hold(Hold(H, "key-h", (block_ids or THEIRS,), TOKEN), pair.now)
    pair.tick(dt)
    pair.settle()


def test_blocks_leave_as_they_are_finished() -> None:
    pair = opened()
    assert_untouched(pair)
    grow(pair, *THEIRS[:2])
    assert pair.ours.scattered == [(0, (11,)), (0, (2,))]
    grow(pair, THEIRS[2])
    assert pair.ours.scattered[2:] == [(0, (30,))]
    assert pair.consumer.results == [], "the last block is still computed"
    complete(pair)
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)
    assert (pair.result.failure, pair.result.first_token) == (None, TOKEN)
    assert pair.result.receipt.received_bytes == pair.result.receipt.produced_bytes == 128
    assert pair.producer.freed == ["key-h"] and pair.is_idle()


def test_only_what_comes_after_the_prompt_is_complete_counts_as_transfer() -> None:
    pair = opened()
    grow(pair, *THEIRS[:3], dt=2.0)
    pair.now += 2.0
    pair.producer.hold(Hold(H, "key-h", (THEIRS,), TOKEN), pair.now)
    pair.tick(0.25)
    pair.settle()
    assert pair.result.receipt.transfer_s == pytest.approx(0.25)


def test_a_reader_of_what_is_computed_does_not_give_up() -> None:
    pair = opened()
    for _ in range(10):
        pair.tick(KEEP_S)
        pair.settle()
    complete(pair)
    assert pair.result.failure is None


def test_a_producer_that_falls_silent_is_given_up() -> None:
    pair = opened()
    pair.tick(STALL_S)
    assert_failed(pair, f"no data for {STALL_S} s")


def test_a_block_that_is_taken_back_in_mid_read_is_not_sent() -> None:
    """Preempted, and its blocks another request's, while they are copied."""
    pair = opened(num_slots=2)

    def preempt() -> None:
        pair.theirs.while_gathering = lambda: None
        pair.theirs.overwrite(0, THEIRS[:1], 0xEE)
        pair.late_commands.append(lambda: pair.producer.revoke(H))

    expected = pair.theirs.content(0, THEIRS)
    pair.theirs.while_gathering = preempt
    grow(pair, *THEIRS[:1])
    assert_untouched(pair)
    assert pair.producer.counts["reads_revoked"] == 1 and len(pair.parcels) == 0
    # Computed once more, elsewhere; what was read is not read again.
    others = (40, 41, 42, 43)
    pair.theirs.scatter(0, others, memoryview(expected))
    grow(pair, *others[:3])
    complete(pair, *others)
    assert pair.result.failure is None
    assert pair.ours.content(0, OURS) == expected


def test_what_was_read_before_a_preemption_stays() -> None:
    pair = opened()
    grow(pair, *THEIRS[:2])
    pair.producer.revoke(H)
    pair.theirs.overwrite(0, THEIRS[:2], 0xEE)
    expected = pair.ours.content(0, OURS[:2])
    others = (40, 41, 42, 43)
    complete(pair, *others)
    assert pair.result.failure is None
    assert pair.ours.content(0, OURS[:2]) == expected
    assert pair.ours.content(0, OURS[2:]) == pair.theirs.content(0, others[2:])


def test_an_abort_with_a_read_in_flight_frees_when_it_is_over() -> None:
    pair = opened()
    freed_while_reading: list[str] = []

    def abort() -> None:
        pair.producer.abandon(H, "key-h")
        freed_while_reading.extend(pair.producer.freed)

    pair.theirs.while_gathering = lambda: pair.late_commands.append(abort)
    grow(pair, *THEIRS[:1])
    assert freed_while_reading == [] and pair.producer.freed == ["key-h"]
    assert_failed(pair, "refused: ended")
    assert_untouched(pair)


def test_an_abort_ends_the_reads_that_wait() -> None:
    pair = opened()
    pair.producer.abandon(H, "key-h")
    assert pair.producer.freed == ["key-h"]
    pair.tick()
    pair.settle()
    assert_failed(pair, "refused: ended")
    assert pair.is_idle()


@pytest.mark.parametrize("end", ["cancel", "give up", "drop"])
def test_others_cannot_end_what_the_engine_computes(end: str) -> None:
    pair = opened()
    if end == "cancel":
        pair.send(pair.consumer.cancel("pull"))
    elif end == "give up":
        pair.send(pair.consumer.cancel("pull"))
        pair.send(pair.consumer.give_up(pair.offer()))
    else:
        pair.producer.end(H, ProducerEvent.ABORTED)
    pair.settle()
    pair.tick(2 * LEASE_S)
    grow(pair, *THEIRS[:2])
    assert pair.producer.freed == []
    assert_untouched(pair)
    complete(pair)
    assert pair.producer.freed == ["key-h"] and pair.is_idle()


def test_a_prompt_that_needs_no_more_blocks_than_are_finished_is_loaded_before_its_end() -> None:
    """Decode samples the first token itself and computes the last prompt token."""
    pair = Pair(chunk_bytes=32)
    pair.producer.open(H, "key-h", 1)
    pair.pull(OURS[:2])
    pair.settle()
    grow(pair, *THEIRS[:2])
    assert (pair.result.failure, pair.result.first_token) == (None, None)
    assert pair.producer.freed == []
    complete(pair)
    assert pair.producer.freed == ["key-h"]


def test_a_first_token_that_does_not_come_is_a_failure() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS, awaits_token=True)
    pair.settle()
    assert_failed(pair, "no first token")


def test_another_prompt_of_the_same_name_is_not_held() -> None:
    pair = opened()
    pair.hold((50, 51), key="other")
    assert pair.producer.freed == ["other"]
    complete(pair)
    assert pair.result.failure is None and pair.producer.freed == ["other", "key-h"]


def test_another_prompt_of_the_same_name_can_be_given_up() -> None:
    pair = opened()
    grow(pair, *THEIRS[:2])
    pair.producer.open(H, "other", 1)
    pair.producer.abandon(H, "other")
    assert pair.producer.freed == ["other"]
    complete(pair)
    assert pair.result.failure is None and pair.producer.freed == ["other", "key-h"]


def test_reads_out_of_range_wait_for_the_end_and_are_refused() -> None:
    pair = Pair()
    pair.producer.open(H, "key-h", 1)
    pair.pull((*OURS, 40))
    pair.settle()
    complete(pair)
    assert_failed(pair, "refused: range")


def test_a_block_given_up_with_the_end_of_its_prompt_is_not_sent_after_it() -> None:
    """Once the prompt is finished, its window has moved on, and the block may be another's."""
    pair = opened(window=1)
    pair.theirs.while_gathering = lambda: pair.producer.hold(
        Hold(H, "key-h", ((0, *THEIRS[1:]),), TOKEN), pair.now
    )
    grow(pair, *THEIRS[:2])
    pair.theirs.while_gathering = lambda: None
    assert pair.producer.counts["reads_revoked"] == 1
    assert_untouched(pair)
    pair.tick()
    pair.settle()
    assert_failed(pair, "outside the attention window")
    assert pair.producer.freed == ["key-h"]
