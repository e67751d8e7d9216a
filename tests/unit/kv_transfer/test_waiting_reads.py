"""Reads that wait at a producer: how many there may be, and what one that breaks does to others."""

from cluster.names import HandoffId
from kv_transfer.producer import _MAX_PARKED, UNKNOWN_GRACE_S, Answer
from kv_transfer.protocol import Blocks, ReadBlocks, Refusal, Refused
from tests.unit.kv_transfer.pair import EPOCH, LAYOUT, Pair, assert_failed

THEIRS, OURS = (3, 9, 4, 20), (11, 2, 30, 5)


def test_reads_that_wait_are_limited_and_repeated_ones_count_once() -> None:
    pair = Pair()

    def ask(first_block: int) -> list[Answer]:
        read = ReadBlocks(HandoffId("h"), EPOCH, LAYOUT.fingerprint, 0, first_block, 1, pair.ways)
        return list(pair.producer.handle(b"x", read, pair.now))

    for first_block in range(_MAX_PARKED):
        assert ask(first_block) == ask(first_block) == []
    (answer,) = ask(_MAX_PARKED)
    assert isinstance(answer.message, Refused) and answer.message.cause is Refusal.CROWDED
    assert ask(0) == []
    # Their hand-off never comes.
    assert len(list(pair.producer.tick(pair.now + UNKNOWN_GRACE_S))) == _MAX_PARKED
    assert repr(pair.producer) == "<Producer held=0 parked=0 out=0>"


def test_a_read_that_cannot_be_served_takes_no_other_along() -> None:
    pair = Pair(window=4)
    pair.pull(OURS)
    pair.settle()
    broken = iter([MemoryError("full")])

    def gathering() -> None:
        for error in broken:
            raise error

    pair.theirs.while_gathering = gathering
    pair.hold(THEIRS)
    answers = list(pair.producer.tick(pair.now))
    assert [type(answer.message) for answer in answers] == [Refused, Blocks]
    pair.answer(answers)
    pair.settle()
    assert_failed(pair, "could not be copied out: MemoryError('full')")
    assert pair.producer.freed == ["key-h"] and pair.is_idle()


def test_a_read_that_breaks_leaves_no_send_behind() -> None:
    pair = Pair()
    pair.hold(THEIRS)

    def fail() -> None:
        raise MemoryError("no room for a copy")

    pair.theirs.while_gathering = fail
    pair.pull(OURS)
    pair.settle()
    assert_failed(pair, "could not be copied out: MemoryError('no room for a copy')")
    assert pair.producer.freed == ["key-h"] and pair.is_idle()
