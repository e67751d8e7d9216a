"""Too little room for payloads: reads wait for it, go another way, or are refused."""

import pytest

from cluster.names import HandoffId
from kv_transfer.handoff import ProducerEvent
from kv_transfer.producer import ROOM_GRACE_S
from kv_transfer.protocol import Place, ReadBlocks, Refusal, Refused, Via
from tests.unit.kv_transfer.pair import EPOCH, LAYOUT, Pair, assert_failed, assert_untouched

THEIRS, OURS = (3, 9, 4, 20), (11, 2, 30, 5)


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_an_arena_with_few_slots_is_enough(num_slots: int) -> None:
    pair = Pair(chunk_bytes=32, window=3, num_slots=num_slots)
    pair.hold(THEIRS)
    pair.pull(OURS)
    for _ in range(8):
        pair.settle()
        pair.tick()
    assert pair.result.failure is None
    assert pair.result.receipt.transport == "inproc"
    assert pair.ours.content(0, OURS) == pair.theirs.content(0, THEIRS)
    assert pair.is_idle()


def test_a_read_that_waits_long_for_room_goes_another_way() -> None:
    pair = Pair(chunk_bytes=32, window=2, num_slots=1)
    pair.hold(THEIRS)
    pair.hold((40,), name="other")
    pair.pull((50,), offer=pair.offer("other"), key="other")
    pair.deliver_to_producer(pair.to_producer.popleft())
    held_back = pair.to_consumer.popleft()
    pair.pull(OURS)
    pair.settle()
    assert "parked=2" in repr(pair.producer)
    pair.tick(2 * ROOM_GRACE_S)
    pair.settle()
    pair.deliver_to_consumer(held_back)
    for _ in range(4):
        pair.settle()
        pair.tick()
    by_key = {ended.key: ended for ended in pair.consumer.results}
    assert by_key["pull"].failure is None and by_key["other"].failure is None
    assert by_key["pull"].receipt.transport == "inproc+tcp"
    assert pair.is_idle()


def test_a_parcel_taken_too_late_is_not_believed() -> None:
    pair = Pair(num_slots=1)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    pair.producer.end(HandoffId("h"), ProducerEvent.ABORTED)
    pair.settle()
    assert_failed(pair, "payload of 0 bytes")
    assert_untouched(pair)
    assert pair.is_idle()


def test_a_read_that_no_transport_can_carry_is_refused() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    read = ReadBlocks(HandoffId("h"), EPOCH, LAYOUT.fingerprint, 0, 0, 1, (Place(Via.SHM, ""),))
    (answer,) = pair.producer.handle(b"x", read, pair.now)
    assert isinstance(answer.message, Refused) and answer.message.cause is Refusal.TRANSPORT
