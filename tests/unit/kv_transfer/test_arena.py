"""Slots of shared memory: who gets which, and what a reader can tell from outside."""

import random

import pytest

from cluster.names import HandoffId
from kv_transfer.arena import MAX_SLOTS, PAGE_BYTES, Arena, ArenaInlet, ArenaShape
from kv_transfer.blocks import host_bytes
from kv_transfer.inproc import InprocTransport
from kv_transfer.parcels import Parcels
from kv_transfer.protocol import Place, Via
from kv_transfer.transport import Stage
from tests.kv_messages import announced
from tests.unit.kv_transfer.pair import FrameTransport

TOKEN = b"t" * 16
SHAPE = ArenaShape(PAGE_BYTES, 2)
A, B = HandoffId("a"), HandoffId("b")


def arena() -> tuple[Arena, memoryview, ArenaInlet]:
    memory = memoryview(bytearray(SHAPE.total_bytes))
    made = Arena(memory, SHAPE, TOKEN, random.Random(1))
    inlet = ArenaInlet.over(memory, TOKEN)
    assert inlet is not None
    return made, memory, inlet


def staged(made: Arena, content: bytes) -> Stage:
    stage = made.stage(len(content))
    assert stage is not None
    stage.buffer[:] = content
    return stage


@pytest.mark.parametrize(
    ("chunk_bytes", "arena_bytes", "slot_bytes", "num_slots"),
    [
        (1, 1, PAGE_BYTES, 2),
        (PAGE_BYTES, 10 * PAGE_BYTES, PAGE_BYTES, 10),
        (PAGE_BYTES + 1, 10 * PAGE_BYTES, 2 * PAGE_BYTES, 5),
        (100 * PAGE_BYTES, PAGE_BYTES, 100 * PAGE_BYTES, 2),
        (1, 1 << 40, PAGE_BYTES, MAX_SLOTS),
    ],
)
def test_shapes(chunk_bytes: int, arena_bytes: int, slot_bytes: int, num_slots: int) -> None:
    assert ArenaShape.for_chunks(chunk_bytes, arena_bytes) == ArenaShape(slot_bytes, num_slots)


def test_what_is_staged_is_read_until_it_is_freed() -> None:
    made, _, inlet = arena()
    stage = staged(made, b"content")
    payload = inlet.open(announced(stage.parcel, 7), None)
    assert (
        payload is not None
        and bytes(host_bytes(payload.content)) == b"content"
        and payload.is_intact()
    )
    made.free(stage.parcel)
    made.free(stage.parcel)
    assert not payload.is_intact()
    assert inlet.open(announced(stage.parcel, 7), None) is None
    again = staged(made, b"another")
    assert not payload.is_intact() and again.parcel != stage.parcel
    with pytest.raises(ValueError, match="released"):
        stage.buffer[0] = 1


def test_slots_are_bounded_and_the_last_used_comes_first() -> None:
    made, _, _ = arena()
    first, second = staged(made, b"1"), staged(made, b"2")
    assert made.stage(1) is None and made.stage(PAGE_BYTES + 1) is None
    assert repr(made) == "<Arena 2 of 2 slots in use>"
    made.free(second.parcel)
    assert staged(made, b"3").parcel % 2 == second.parcel % 2 != first.parcel % 2


def test_a_reader_believes_nothing() -> None:
    made, memory, inlet = arena()
    good = staged(made, b"x").parcel
    for parcel in (0, 1, -1, good + 1, good + 2, 2**63, 10**30):
        assert inlet.open(announced(parcel, 1), None) is None
    for num_bytes in (0, -1, PAGE_BYTES + 1, 1 << 40):
        assert inlet.open(announced(good, num_bytes), None) is None
    assert inlet.open(announced(good, 1), memoryview(b"x")) is None
    assert ArenaInlet.over(memory, b"u" * 16) is None
    assert ArenaInlet.over(memory[:-1], TOKEN) is None
    assert ArenaInlet.over(memory[:10], TOKEN) is None
    inlet.close()
    assert inlet.open(announced(good, 1), None) is None


def parcels() -> Parcels:
    arena_ = InprocTransport(SHAPE, places={})
    return Parcels({Via.INPROC: arena_, Via.TCP: FrameTransport()}, timeout_s=3.0)


def ways(*vias: Via) -> list[Place]:
    return [Place(via, "") for via in vias]


def out(book: Parcels, owner: HandoffId, now: float = 0.0) -> int:
    staged_ = book.stage(ways(Via.INPROC), 8, owner, now)
    assert staged_ is not None
    return staged_[1].parcel


def test_parcels_go_back_to_their_owner_only() -> None:
    book = parcels()
    first, second = out(book, A), out(book, B)
    assert book.stage(ways(Via.INPROC), 8, A, 0.0) is None
    book.take_back(A, [second, 99])
    assert len(book) == 2
    book.take_back(A, [first, first])
    book.end(B)
    book.end(B)
    assert len(book) == 0
    assert out(book, A) not in (first, second)


def test_parcels_nobody_takes_come_back_in_time() -> None:
    book = parcels()
    late = out(book, A, now=0.0)
    out(book, A, now=2.0)
    assert book.expire(2.9) == 0
    assert book.expire(3.0) == 1
    book.take_back(A, [late])
    assert len(book) == 1
    assert book.expire(5.0) == 1 and len(book) == 0


def test_a_full_way_is_passed_over_and_frames_are_not_kept_book_of() -> None:
    book = parcels()
    out(book, A), out(book, A)
    found = book.stage(ways(Via.INPROC, Via.TCP), 8, A, 0.0)
    assert found is not None and found[0] is Via.TCP and len(book) == 2


def test_ways_that_do_not_exist_or_fit_are_not_used() -> None:
    book = parcels()
    found = book.usable(ways(Via.SHM, Via.TCP, Via.INPROC), 8, is_held=True)
    assert found == ways(Via.TCP, Via.INPROC)
    assert book.usable(ways(Via.INPROC, Via.TCP), PAGE_BYTES + 1, is_held=True) == ways(Via.TCP)
    assert book.usable(ways(Via.INPROC), PAGE_BYTES + 1, is_held=True) == []
    assert book.places([Via.SHM, Via.TCP]) == (Place(Via.TCP, ""),)
