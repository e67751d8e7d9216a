"""What every `Transport` promises, asked of a producer and a consumer with their own ports."""

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.names import HandoffId
from kv_transfer.blocks import Content
from kv_transfer.protocol import CODEC, Blocks, Via
from kv_transfer.shm import ShmTransport
from kv_transfer.transports import arena_shape
from tests.contract.handoff_sides import (
    BLOCK_BYTES,
    COPIED_OUT,
    EPOCH,
    KINDS,
    NUM_BLOCKS,
    SECTION,
    Open,
    Side,
    content,
    store_of,
)
from tests.kv_messages import announced
from tests.waiting import wait_for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 6, 37, 300])
def test_odd_sizes_cross_whole(open_side: Open, kind: str, num_blocks: int) -> None:
    producer, consumer = open_side(kind), open_side(kind)
    rng = random.Random(num_blocks)
    theirs, ours = (rng.sample(range(1, NUM_BLOCKS), num_blocks) for _ in range(2))
    consumer.pull(producer.hold("h", theirs, theirs[:3]), ours, ours[:3])
    wait_for(consumer.has_ended("h"))
    ended = consumer.pulls["h"]
    assert ended.failure is None
    assert ended.receipt.transport == kind
    assert ended.receipt.received_bytes == ended.receipt.produced_bytes
    assert content(consumer.store, ours) == content(producer.store, theirs)
    assert content(consumer.store, ours[:3], 1) == content(producer.store, theirs[:3], 1)
    wait_for(producer.has_freed("h"))
    wait_for(lambda: "out=0" in repr(producer.port))
    assert consumer.port.totals()[f"via_{kind}"] == ended.receipt.received_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_what_was_asked_for_is_written(open_side: Open, kind: str) -> None:
    producer, consumer = open_side(kind), open_side(kind)
    ours = range(10, 50)
    others = [block for block in range(NUM_BLOCKS) if block not in ours]
    before = content(consumer.store, others)
    consumer.pull(producer.hold("h", range(100, 140)), ours)
    wait_for(consumer.has_ended("h"))
    assert content(consumer.store, others) == before


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_from_both_sides(open_side: Open, kind: str) -> None:
    """Each is producer and consumer; the arena has fewer slots than chunks are asked for."""
    sides = open_side(kind, arena_mib=1), open_side(kind, arena_mib=1), open_side(kind)
    names = [f"h{number}" for number in range(60)]
    expected: dict[str, tuple[Side, list[int], bytes]] = {}
    for number, name in enumerate(names):
        source, target = sides[number % 3], sides[(number + 1) % 3]
        start = 1 + 9 * (number // 3)
        theirs, ours = list(range(start, start + 9)), list(range(300 + start, 309 + start))
        target.pull(source.hold(name, theirs), ours)
        expected[name] = (target, ours, content(source.store, theirs))
    for name, (target, ours, bytes_) in expected.items():
        wait_for(target.has_ended(name))
        assert target.pulls[name].failure is None
        assert content(target.store, ours) == bytes_
    for number, name in enumerate(names):
        wait_for(sides[number % 3].has_freed(name))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_late_and_foreign_reads(open_side: Open, kind: str) -> None:
    producer, consumer = open_side(kind), open_side(kind)
    before = content(consumer.store, range(1, 9))
    offer = producer.hold("stale", range(1, 9))
    consumer.pull(replace(offer, epoch=EPOCH + 1), range(1, 9))
    consumer.pull(replace(producer.hold("layout", [9]), fingerprint="f" * 32), [1])
    gone = producer.hold("gone", range(20, 28))
    producer.port.abort(HandoffId("gone"))
    consumer.pull(gone, range(1, 9))
    wait_for(consumer.has_ended("stale", "layout", "gone"))
    failures = {name: ended.failure or "" for name, ended in consumer.pulls.items()}
    assert "stale_epoch" in failures["stale"]
    assert "layout" in failures["layout"] and "ended" in failures["gone"]
    assert content(consumer.store, range(1, 9)) == before


@pytest.mark.parametrize("kind", COPIED_OUT)
def test_damage_on_the_way_is_found_and_not_written(open_side: Open, kind: str) -> None:
    producer, consumer = open_side(kind), open_side(kind, fault="corrupt_received_block")
    before = content(consumer.store, range(1, 9))
    consumer.pull(producer.hold("h", range(1, 9)), range(1, 9))
    wait_for(consumer.has_ended("h"))
    assert "checksum" in (consumer.pulls["h"].failure or "")
    assert content(consumer.store, range(1, 9)) == before
    wait_for(producer.has_freed("h"))


@pytest.mark.parametrize("kind", COPIED_OUT)
def test_blocks_reused_during_the_copy_are_never_announced(open_side: Open, kind: str) -> None:
    producer, consumer = open_side(kind), open_side(kind)
    before = content(consumer.store, range(1, 9))
    gather = producer.store.gather

    def preempt(group: int, block_ids: Sequence[int], into: memoryview) -> None:
        gather(group, block_ids, into)
        producer.port.abort(HandoffId("h"))

    producer.store.gather = preempt  # type: ignore[method-assign]
    consumer.pull(producer.hold("h", range(1, 9)), range(1, 9))
    wait_for(consumer.has_ended("h"))
    assert "ended" in (consumer.pulls["h"].failure or "")
    assert content(consumer.store, range(1, 9)) == before
    wait_for(producer.has_freed("h"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_pull_gives_everything_back(open_side: Open, kind: str) -> None:
    producer, consumer = open_side(kind), open_side(kind)
    for number in range(20):
        name = f"h{number}"
        consumer.pull(producer.hold(name, range(1, 300)), range(1, 300))
        consumer.port.cancel(name)
        wait_for(consumer.has_ended(name), 2)
        wait_for(producer.has_freed(name), 2)
    wait_for(lambda: "out=0" in repr(producer.port))
    consumer.pull(producer.hold("after", range(1, 300)), range(1, 300))
    wait_for(consumer.has_ended("after"))
    assert consumer.pulls["after"].failure is None


@pytest.mark.parametrize("kind", ["inproc", "shm", "gloo", "cuda_ipc"])
def test_a_full_arena_makes_reads_wait_for_room(open_side: Open, kind: str) -> None:
    """Nothing else is allowed to these: ten hand-offs share two slots."""
    section = {"arena_mib": 1, "chunk_bytes": 400 << 10}
    producer, consumer = open_side(kind, **section), open_side(kind, **section)
    names = [f"h{number}" for number in range(10)]
    for number, name in enumerate(names):
        theirs, ours = range(1, 300), range(300 - number, 599 - number)
        consumer.pull(producer.hold(name, theirs), ours)
    wait_for(consumer.has_ended(*names), 30)
    assert {ended.failure for ended in consumer.pulls.values()} == {None}
    assert content(consumer.store, range(291, 590)) == content(producer.store, range(1, 300))


def test_a_full_arena_is_left_for_frames_after_a_while(open_side: Open) -> None:
    """Another consumer sits on every slot; this one gets its blocks the other way."""
    section = {"arena_mib": 1, "chunk_bytes": 400 << 10, "stall_timeout_s": 20.0}
    producer = open_side("shm", "tcp", **section)
    idle, consumer = open_side("shm", "tcp", **section), open_side("shm", "tcp", **section)
    stuck = threading.Event()
    handle = idle.port.consumer.handle

    def sit(message: Any, payload: Any, now: float) -> Any:
        stuck.set()
        return () if isinstance(message, Blocks) else handle(message, payload, now)

    idle.port.consumer.handle = sit  # type: ignore[method-assign]
    idle.pull(producer.hold("idle", range(1, 300)), range(1, 300))
    assert stuck.wait(5)
    wait_for(lambda: "out=2" in repr(producer.port))
    consumer.pull(producer.hold("h", range(1, 300)), range(1, 300))
    wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].failure is None
    assert "tcp" in consumer.pulls["h"].receipt.transport
    assert content(consumer.store, range(1, 300)) == content(producer.store, range(1, 300))


@pytest.mark.parametrize("kind", ["inproc", "cma", "shm", "cuda_ipc"])
def test_memory_taken_back_during_a_read_fails_the_pull(open_side: Open, kind: str) -> None:
    """Without checksums too: a reader finds out by what the slot says of itself."""
    producer, consumer = open_side(kind, checksum=False), open_side(kind, checksum=False)
    scatter = consumer.store.scatter
    reading, may_go_on = threading.Event(), threading.Event()

    def slow(group: int, block_ids: Sequence[int], payload: Content) -> None:
        scatter(group, block_ids, payload)
        reading.set()
        assert may_go_on.wait(10)

    consumer.store.scatter = slow  # type: ignore[method-assign]
    consumer.pull(producer.hold("h", range(1, 4)), range(1, 4))
    assert reading.wait(5)
    producer.port.abort(HandoffId("h"))
    wait_for(producer.has_freed("h"))
    may_go_on.set()
    wait_for(consumer.has_ended("h"))
    assert "took its memory back" in (consumer.pulls["h"].failure or "")


def test_another_life_of_the_producer_is_greeted_anew(open_side: Open) -> None:
    first, second, consumer = open_side("shm"), open_side("shm", epoch=7), open_side("shm")
    for side, name in ((first, "a"), (second, "b"), (first, "c")):
        # As if the second had come up at the first one's address.
        offer = replace(side.hold(name, [3, 4]), endpoints=(side.port.endpoint,))
        consumer.pull(offer, [1, 2])
        wait_for(consumer.has_ended(name))
        assert consumer.pulls[name].failure is None
        assert content(consumer.store, [1, 2]) == content(side.store, [3, 4])


@pytest.mark.parametrize(
    ("theirs", "ours", "transport"),
    [
        (("shm", "tcp"), ("shm", "tcp"), "shm"),
        (("tcp", "shm"), ("shm", "tcp"), "shm"),
        (("shm", "tcp"), ("tcp", "shm"), "tcp"),
        (("tcp",), ("shm", "tcp"), "tcp"),
        (("shm", "tcp"), ("tcp",), "tcp"),
        (("inproc", "tcp"), ("shm", "tcp"), "tcp"),
        (("gloo", "tcp"), ("gloo", "tcp"), "gloo"),
        (("gloo", "shm"), ("tcp", "shm", "gloo"), "shm"),
        (("cma", "shm"), ("cma", "shm", "tcp"), "cma"),
        (("shm", "tcp"), ("cma", "shm", "tcp"), "shm"),
        (("cuda_ipc", "gloo", "shm"), ("cuda_ipc", "gloo", "shm"), "cuda_ipc"),
        (("gloo", "shm"), ("cuda_ipc", "gloo", "shm"), "gloo"),
    ],
)
def test_a_pair_uses_the_best_that_both_have(
    open_side: Open, theirs: tuple[str, ...], ours: tuple[str, ...], transport: str
) -> None:
    producer, consumer = open_side(*theirs), open_side(*ours)
    consumer.pull(producer.hold("h", [3, 4]), [1, 2])
    wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].receipt.transport == transport


def test_a_pair_with_nothing_in_common_is_refused_at_once(open_side: Open) -> None:
    producer, consumer = open_side("shm"), open_side("tcp", stall_timeout_s=20.0)
    consumer.pull(producer.hold("h", [3, 4]), [1, 2])
    wait_for(consumer.has_ended("h"), 2)
    assert "this side has tcp, the producer none of them" in (consumer.pulls["h"].failure or "")
    wait_for(producer.has_freed("h"), 2)


# Where a segment is, and where one only seems to be.


def test_segments_that_cannot_be_reached_or_are_others_are_not_used(tmp_path: Path) -> None:
    here = ShmTransport(arena_shape(SECTION, store_of(0)))
    boot, pid, fd, token = here.address().split("/")
    plain = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    unsealed = os.memfd_create("tandem-kv")
    os.ftruncate(unsealed, 1 << 16)
    try:
        assert here.attach(here.address()) is not None
        for address in (
            f"another-boot/{pid}/{fd}/{token}",
            f"{boot}/{pid}/{fd}/{'00' * 16}",
            f"{boot}/{pid}/{plain}/{token}",
            f"{boot}/{pid}/{unsealed}/{token}",
            f"{boot}/{pid}/99999/{token}",
            f"{boot}/1/{fd}/{token}",
            f"{boot}/{pid}/../{fd}/{token}",
            f"{boot}/{pid}/-1/{token}",
            f"{boot}/{pid}/{fd}/nothex",
            "",
        ):
            assert here.attach(address) is None, address
    finally:
        os.close(plain)
        os.close(unsealed)
        here.close()


def test_frames_that_claim_parcels_are_not_believed(open_side: Open) -> None:
    """A message may name any parcel of any transport: what is not there is not read."""
    consumer = open_side("shm", "tcp")
    message = announced(2**63, BLOCK_BYTES)
    assert CODEC.decode(CODEC.encode(message)) == message
    inlet = consumer.port._transports[Via.SHM].attach(consumer.port._transports[Via.SHM].address())
    assert inlet is not None
    for parcel in (0, 1, -1, 2**63, 10**30):
        assert inlet.open(announced(parcel, BLOCK_BYTES), None) is None
    assert inlet.open(announced(5, 1 << 40), None) is None
    inlet.close()
