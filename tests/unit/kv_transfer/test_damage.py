"""Damaged chunks fail their pull and are never written; the fault that tests inject is one."""

import math
from dataclasses import replace

import pytest

from kv_transfer.blocks import HostBlockStore
from kv_transfer.faults import corrupt_block, damage_of
from kv_transfer.layout import Read
from kv_transfer.protocol import CODEC
from tests.unit.kv_transfer.pair import LAYOUT, Frame, Pair, assert_failed, assert_untouched

THEIRS, OURS = (3, 9, 4, 20), (11, 2, 30, 5)


@pytest.mark.parametrize(
    ("label", "damage", "reason"),
    [
        ("flipped bit", lambda payload: bytes([payload[0] ^ 1]) + payload[1:], "checksum"),
        ("swapped blocks", lambda payload: payload[8:16] + payload[:8] + payload[16:], "checksum"),
        ("truncated", lambda payload: payload[:-1], "payload of 63 bytes, wanted 64"),
        ("too long", lambda payload: payload + b"x", "payload of 65 bytes, wanted 64"),
        ("empty", lambda payload: b"", "payload of 0 bytes, wanted 64"),
        ("missing", lambda payload: None, "payload of 0 bytes, wanted 64"),
    ],
)
def test_damaged_blocks_are_never_written(label: str, damage: object, reason: str) -> None:
    pair = Pair()
    before = pair.ours.content(0, range(64))
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    frame = pair.to_consumer.popleft()
    assert callable(damage)
    pair.deliver_to_consumer(Frame(frame.message, damage(frame.payload)))
    pair.settle()
    assert_failed(pair, reason)
    assert_untouched(pair)
    assert pair.ours.content(0, range(64)) == before
    assert pair.consumer.counts["chunks_damaged"] == 1
    assert pair.producer.freed == ["key-h"]


def test_a_header_that_lies_about_its_payload() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    message, payload = pair.next_blocks()
    pair.deliver_to_consumer(Frame(CODEC.encode(replace(message, payload_bytes=1)), payload))
    assert_failed(pair, "payload")
    assert_untouched(pair)


def test_the_blocks_of_another_read_are_not_taken_for_these() -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS)
    for _ in range(2):
        pair.deliver_to_producer(pair.to_producer.popleft())
    first, _ = pair.next_blocks()
    _, second_payload = pair.next_blocks()
    pair.deliver_to_consumer(Frame(CODEC.encode(first), second_payload))
    assert_failed(pair, "checksum")
    assert_untouched(pair)


def test_damage_passes_without_checksums() -> None:
    """Why they are on by default; also the control of the tests above."""
    pair = Pair(is_checksummed=False)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    message, payload = pair.next_blocks()
    assert message.checksum is None
    flipped = bytes([payload[0] ^ 1]) + payload[1:]
    pair.deliver_to_consumer(Frame(CODEC.encode(message), flipped))
    pair.settle()
    assert pair.result.failure is None
    assert pair.ours.content(0, OURS) != pair.theirs.content(0, THEIRS)


@pytest.mark.parametrize("is_checksummed", [True, False])
def test_the_injected_fault_is_what_checksums_catch(is_checksummed: bool) -> None:
    damage = damage_of("corrupt_received_block", LAYOUT)
    pair = Pair(is_checksummed=is_checksummed, damage=damage)
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.settle()
    if is_checksummed:
        assert_failed(pair, "checksum")
        assert_untouched(pair)
    else:
        assert pair.result.failure is None
        # Chunks of two blocks: the first of each is damaged, the other is whole.
        good = [index for index in range(4) if _block(pair, index)]
        assert good == [1, 3]


def _block(pair: Pair, index: int) -> bool:
    ours, theirs = OURS[index : index + 1], THEIRS[index : index + 1]
    return pair.ours.content(0, ours) == pair.theirs.content(0, theirs)


def test_no_fault_is_the_default() -> None:
    assert damage_of("none", LAYOUT) is None


def test_a_corrupted_block_is_wrong_in_every_region() -> None:
    store = HostBlockStore(LAYOUT, 4)
    payload = memoryview(bytes(3 * 32))
    store.scatter(0, (1, 2, 3), corrupt_block(LAYOUT, Read(0, 0, 3), payload))
    got = [bytearray(32) for _ in range(3)]
    for block_id, content in enumerate(got, 1):
        store.gather(0, (block_id,), memoryview(content))
    assert got == [bytes([0x80]) * 32, bytes(32), bytes(32)]


@pytest.mark.parametrize("held_s", [-1.0, -math.inf, math.inf, math.nan, -1e308])
def test_a_time_that_cannot_be_ends_its_pull_and_nothing_else(held_s: float) -> None:
    pair = Pair()
    pair.hold(THEIRS)
    pair.pull(OURS)
    pair.deliver_to_producer(pair.to_producer.popleft())
    message, payload = pair.next_blocks()
    pair.deliver_to_consumer(Frame(CODEC.encode(replace(message, held_s=held_s)), payload))
    assert_failed(pair, "held for")
    assert_untouched(pair)
