"""Both sides of a hand-off joined in memory: what arrives, what is refused, what is freed."""

from dataclasses import replace

import pytest

from cluster.messages import Offer
from cluster.names import HandoffId
from kv_transfer.handoff import ProducerEvent
from kv_transfer.producer import UNKNOWN_GRACE_S
from kv_transfer.protocol import CODEC, ReadBlocks, Refusal, Refused, Release
from tests.unit.kv_transfer.pair import (
    EPOCH,
    LAYOUT,
    LEASE_S,
    STALL_S,
    TWO_GROUPS,
    Frame,
    Pair,
    assert_failed,
    assert_untouched,
)

THEIRS, OURS = (3, 9, 4, 20), (11, 2, 30, 5)


# Transfers.


@pytest.mark.parametrize("chunk_bytes", [1, 32, 64, 100, 4096])
@pytest.mark.parametrize("window", [1, 2, 8])
def test_blocks_arrive_and_both_sides_are_done(chunk_bytes: int, window: int) -> None:
    pair = Pair(chunk_bytes=chunk_bytes, window=window)
    pair.hold(THEIRS)
    pair.pull(OURS)
    assert len(pair.to_producer) <= window
    pair.settle()
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)
    receipt = pair.result.receipt
    assert (pair.result.key, pair.result.failure) == ("pull", None)
    assert (receipt.num_blocks, receipt.received_bytes, receipt.produced_bytes) == (4, 128, 128)
    assert pair.producer.freed == ["key-h"]
    assert pair.is_idle()


def test_chunks_that_overtake_each_other_add_up() -> None:
    pair = Pair(chunk_bytes=64, window=2)
    pair.hold(THEIRS)
    pair.pull(OURS)
    while pair.to_producer:
        pair.deliver_to_producer(pair.to_producer.popleft())
    pair.to_consumer.reverse()
    pair.settle()
    receipt = pair.result.receipt
    assert (pair.result.failure, receipt.received_bytes, receipt.produced_bytes) == (None, 128, 128)
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)


def test_two_groups_have_their_own_blocks() -> None:
    pair = Pair(TWO_GROUPS)
    pair.hold(THEIRS, (7, 8))
    pair.pull(OURS, (1, 6))
    pair.settle()
    assert pair.result.failure is None
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)
    assert pair.ours.content(1, (1, 6)) == pair.theirs.content(1, (7, 8))


def test_blocks_cached_here_are_not_fetched() -> None:
    pair = Pair()
    before = pair.ours.content(0, OURS[:3])
    pair.hold(THEIRS)
    pair.pull(OURS, first_blocks=[3])
    pair.settle()
    assert pair.ours.content(0, OURS[:3]) == before
    assert pair.ours.content(0, OURS[3:]) == pair.theirs.content(0, THEIRS[3:])
    assert (pair.result.failure, pair.result.receipt.num_blocks) == (None, 1)


def test_a_pull_of_nothing_is_loaded_and_released() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS, first_blocks=[4])
    pair.settle()
    assert pair.result.failure is None and pair.producer.freed == ["key-h"]
    assert_untouched(pair)


def test_blocks_outside_the_window_are_not_fetched() -> None:
    pair = Pair()
    pair.hold((0, 0, 4, 20))
    pair.pull((0, 0, 30, 5))
    pair.settle()
    assert pair.result.failure is None
    assert pair.ours.content(0, (30, 5)) == pair.theirs.content(0, (4, 20))
    assert pair.result.receipt.num_blocks == 2


def test_several_pulls_share_a_port() -> None:
    pair = Pair(chunk_bytes=32)
    for index in range(4):
        pair.hold([4 * index + 1, 4 * index + 2], name=f"h{index}")
        offer = pair.offer(f"h{index}")
        pair.pull([40 + 2 * index, 41 + 2 * index], offer=offer, key=f"p{index}")
    pair.settle()
    assert {ended.key: ended.failure for ended in pair.consumer.results} == dict.fromkeys(
        ["p0", "p1", "p2", "p3"]
    )
    for index in range(4):
        got = pair.ours.content(0, [40 + 2 * index, 41 + 2 * index])
        assert got == pair.theirs.content(0, [4 * index + 1, 4 * index + 2])


# Refusals.


@pytest.mark.parametrize(
    ("label", "changes", "reason"),
    [
        ("another life of the producer", {"epoch": EPOCH + 1}, "stale_epoch"),
        ("an unknown hand-off", {"handoff_id": HandoffId("other")}, "unknown"),
    ],
)
def test_offers_that_are_not_the_producers(
    label: str, changes: dict[str, object], reason: str
) -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS, offer=pair.offer(**changes))  # type: ignore[arg-type]
    pair.settle()
    pair.tick(UNKNOWN_GRACE_S)
    pair.settle()
    assert_failed(pair, reason)
    assert_untouched(pair)
    assert pair.producer.freed == [], "the true owner's blocks stay held"


def test_another_layout_fails_before_anything_is_read() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS, offer=pair.offer(fingerprint="f" * 32))
    (release,) = map(CODEC.decode, pair.to_producer)
    assert release == Release(HandoffId("h"), EPOCH, is_loaded=False)
    pair.settle()
    assert_failed(pair, "layout ffffffff")
    assert pair.producer.freed == ["key-h"]


@pytest.mark.parametrize(
    ("label", "read", "cause"),
    [
        ("layout", {"fingerprint": "f" * 32}, Refusal.LAYOUT),
        ("epoch before layout", {"epoch": 1, "fingerprint": "f"}, Refusal.STALE_EPOCH),
        ("group", {"group": 1}, Refusal.RANGE),
        ("negative group", {"group": -1}, Refusal.RANGE),
        ("past the end", {"first_block": 3, "num_blocks": 2}, Refusal.RANGE),
        ("far past the end", {"first_block": 2**63}, Refusal.RANGE),
        ("negative first", {"first_block": -1}, Refusal.RANGE),
        ("nothing", {"num_blocks": 0}, Refusal.RANGE),
        ("less than nothing", {"num_blocks": -1}, Refusal.RANGE),
        ("a null block", {"first_block": 1}, Refusal.RANGE),
    ],
)
def test_reads_a_producer_refuses(label: str, read: dict[str, object], cause: Refusal) -> None:
    pair = Pair()
    pair.hold((3, 0, 4, 20))
    whole = ReadBlocks(HandoffId("h"), EPOCH, LAYOUT.fingerprint, 0, 0, 1)
    (answer,) = pair.producer.handle(b"x", replace(whole, **read), pair.now)  # type: ignore[arg-type]
    assert isinstance(answer.message, Refused)
    assert (answer.message.cause, answer.frame) == (cause, None)
    assert pair.producer.counts[f"refused_{cause.value}"] == 1
    assert pair.producer.freed == []


@pytest.mark.parametrize("event", [ProducerEvent.RELEASED, ProducerEvent.ABORTED])
def test_reads_after_the_end_are_refused(event: ProducerEvent) -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.producer.end(HandoffId("h"), event)
    pair.producer.end(HandoffId("h"), event)
    assert pair.producer.freed == ["key-h"]
    pair.pull(OURS)
    pair.settle()
    assert_failed(pair, "refused: ended")
    assert_untouched(pair)


def test_an_end_in_the_middle_fails_the_pull_without_more_blocks() -> None:
    pair = Pair(chunk_bytes=32, window=1)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    pair.deliver_to_consumer(pair.to_consumer.popleft())
    pair.producer.end(HandoffId("h"), ProducerEvent.ABORTED)
    pair.theirs.overwrite(0, THEIRS, 0xEE)
    pair.settle()
    assert_failed(pair, "refused: ended")
    assert pair.ours.scattered == [(0, OURS[:1])]


def test_blocks_taken_while_they_are_gathered_are_never_sent() -> None:
    """Reused bytes have a valid checksum: only the second look at ownership can tell."""
    pair = Pair()
    pair.hold(THEIRS)

    def preempt() -> None:
        pair.theirs.overwrite(0, THEIRS, 0xEE)
        pair.late_commands.append(lambda: pair.producer.end(HandoffId("h"), ProducerEvent.ABORTED))

    pair.theirs.while_gathering = preempt
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    (frame,) = pair.to_consumer
    assert frame.payload is None
    assert CODEC.decode(frame.message).cause is Refusal.ENDED
    assert pair.producer.freed == ["key-h"], "freed once the read is over"
    pair.settle()
    assert_failed(pair, "ended")
    assert_untouched(pair)


def test_blocks_are_not_freed_during_a_read() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    freed_during: list[list[str]] = []

    def abort() -> None:
        pair.producer.end(HandoffId("h"), ProducerEvent.ABORTED)
        freed_during.append(list(pair.producer.freed))

    pair.theirs.while_gathering = abort
    pair.pull(OURS)
    pair.settle()
    assert freed_during == [[]]
    assert pair.producer.freed == ["key-h"]


def test_two_prompts_under_one_name_are_both_given_up() -> None:
    pair = Pair()
    pair.hold(THEIRS, key="first")
    pair.hold((40, 41), key="second")
    assert sorted(pair.producer.freed) == ["first", "second"]
    pair.pull(OURS)
    pair.settle()
    assert_failed(pair, "refused: ended")
    assert_untouched(pair)


# Frames that nobody asked for.


def test_replayed_and_foreign_blocks_are_counted_and_dropped() -> None:
    pair = Pair(chunk_bytes=32, window=1)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    message, payload = pair.next_blocks()
    frame = Frame(CODEC.encode(message), payload)
    for _ in range(3):
        pair.deliver_to_consumer(frame)
    foreign = replace(message, first_block=2)
    pair.deliver_to_consumer(Frame(CODEC.encode(foreign), payload))
    assert pair.consumer.counts["chunks_foreign"] == 3
    assert pair.ours.scattered == [(0, OURS[:1])]
    pair.settle()
    pair.deliver_to_consumer(frame)
    assert pair.consumer.counts["chunks_late"] == 1
    assert pair.result.failure is None
    assert pair.result.receipt.num_blocks == 4


def test_blocks_that_come_after_a_cancel_are_not_written() -> None:
    """The engine gives the blocks to somebody else as soon as it reads the result."""
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.send(pair.consumer.cancel("pull"))
    pair.send(pair.consumer.cancel("pull"))
    pair.settle()
    assert_failed(pair, "cancelled")
    assert_untouched(pair)
    assert pair.consumer.counts["chunks_late"] == 2
    assert pair.producer.freed == ["key-h"]
    assert pair.is_idle()


def test_cancelling_what_is_not_pulled_is_no_error() -> None:
    assert list(Pair().consumer.cancel("nobody")) == []


def test_a_second_pull_of_one_handoff_fails_and_leaves_the_first() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS, key="first")
    pair.pull((50, 51, 52, 53), key="second")
    pair.settle()
    failures = {ended.key: ended.failure for ended in pair.consumer.results}
    assert failures == {"first": None, "second": "this hand-off is being pulled already"}
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)


def test_an_offer_without_an_address_fails_and_harms_nobody() -> None:
    pair = Pair()
    nowhere: Offer = pair.offer(endpoints=())
    pair.consumer.announce(nowhere, pair.now)
    pair.send(pair.consumer.give_up(nowhere))
    pair.consumer.announce(nowhere, pair.now)
    pair.tick(LEASE_S)
    pair.pull(OURS, offer=nowhere)
    assert_failed(pair, "w has 0 ranks, this is 0")
    assert not pair.to_producer


# Time.


def test_a_stalled_pull_fails_by_duration() -> None:
    pair = Pair(chunk_bytes=32, window=1)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    pair.now += STALL_S / 2
    pair.deliver_to_consumer(pair.to_consumer.popleft())
    pair.tick(STALL_S * 0.9)
    assert pair.consumer.results == []
    pair.tick(STALL_S * 0.2)
    assert_failed(pair, "no data for 3.0 s from tcp://producer")


def test_a_hold_nobody_wants_expires_by_duration() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.tick(LEASE_S * 0.9)
    assert pair.producer.freed == []
    pair.tick(LEASE_S * 0.2)
    assert pair.producer.freed == ["key-h"]
    assert pair.producer.counts["handoffs_expired"] == 1
    pair.pull(OURS)
    pair.settle()
    assert_failed(pair, "refused: ended")
    assert_untouched(pair)


def test_announced_offers_are_renewed_until_they_are_pulled() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.consumer.announce(pair.offer(), pair.now)
    for _ in range(30):
        pair.tick(LEASE_S / 3)
        pair.settle()
    assert pair.producer.freed == []
    pair.pull(OURS)
    pair.settle()
    assert pair.result.failure is None
    pair.tick(LEASE_S)
    assert not pair.to_producer, "what was pulled is not renewed"


def test_announced_offers_that_are_given_up_are_released() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.consumer.announce(pair.offer(), pair.now)
    pair.send(pair.consumer.give_up(pair.offer()))
    pair.settle()
    assert pair.producer.freed == ["key-h"]
    assert pair.is_idle()


def test_reads_renew_the_lease() -> None:
    pair = Pair(chunk_bytes=32, window=1)
    pair.hold(THEIRS)
    pair.pull(OURS)
    while pair.to_producer:
        pair.now += LEASE_S * 0.9
        pair.answer(pair.producer.tick(pair.now))
        pair.deliver_to_producer(pair.to_producer.popleft())
        while pair.to_consumer:
            pair.deliver_to_consumer(pair.to_consumer.popleft())
    assert pair.result.failure is None


def test_a_release_or_renewal_of_another_life_changes_nothing() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    stale = Release(HandoffId("h"), EPOCH + 1, is_loaded=False)
    assert list(pair.producer.handle(b"x", stale, pair.now)) == []
    assert pair.producer.freed == []
    assert pair.producer.counts["refused_stale_epoch"] == 1


def test_a_read_that_comes_before_its_hold_waits_for_it() -> None:
    pair = Pair()
    pair.pull(OURS)
    pair.settle()
    assert repr(pair.producer) == "<Producer held=0 parked=2 out=0>"
    pair.tick(UNKNOWN_GRACE_S * 0.9)
    pair.hold(THEIRS)
    pair.tick()
    pair.settle()
    assert pair.result.failure is None
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)


def test_a_read_whose_hold_never_comes_is_refused() -> None:
    pair = Pair()
    pair.pull(OURS)
    pair.settle()
    pair.tick(UNKNOWN_GRACE_S)
    pair.settle()
    assert_failed(pair, "unknown")
    assert pair.is_idle()


def test_many_holds_that_arrive_during_one_read_do_not_nest() -> None:
    """Each hold has reads waiting: answering them inside the hold would overflow the stack."""
    pair = Pair(window=1)
    count = 400
    for index in range(count):
        pair.pull((1,), offer=pair.offer(f"h{index}"), key=f"p{index}")
    pair.settle()
    for index in range(count):
        pair.late_commands.append(lambda index=index: pair.hold((2,), name=f"h{index}"))  # type: ignore[misc]
    pair.hold(THEIRS, name="x")
    pair.pull(OURS, offer=pair.offer("x"), key="px")
    pair.settle()
    pair.tick()
    pair.settle()
    assert [ended.failure for ended in pair.consumer.results] == [None] * (count + 1)
