"""Blocks read in place: who may read which, and what of a producer's word is believed."""

import os

import numpy as np
import pytest

from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import host_bytes
from kv_transfer.cma import CmaInlet, CmaTransport
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.protocol import Via
from kv_transfer.transport import Payload
from tests.kv_messages import announced

LAYOUT = BlockLayout((GroupLayout(16, (5, 8192)),), {"model": "m"})
BLOCK_BYTES = 5 + 8192


def store(seed: int, num_blocks: int = 3000) -> ArrayBlockStore:
    rng = np.random.default_rng(seed)
    sizes = LAYOUT.groups[0].region_bytes
    rows = [rng.integers(0, 256, (num_blocks, size), np.uint8) for size in sizes]
    return ArrayBlockStore(LAYOUT, [rows])


def transport(blocks: ArrayBlockStore) -> CmaTransport:
    return CmaTransport(blocks.regions())


def attached(producer: CmaTransport) -> CmaInlet:
    inlet = transport(store(9)).attach(producer.address())
    assert inlet is not None
    return inlet


def opened(inlet: CmaInlet, parcel: int, *block_ids: int) -> Payload | None:
    size = len(block_ids) * BLOCK_BYTES
    return inlet.open(announced(parcel, size, Via.CMA, block_ids), None)


def content(blocks: ArrayBlockStore, *block_ids: int) -> bytes:
    out = bytearray(len(block_ids) * BLOCK_BYTES)
    blocks.gather(0, block_ids, memoryview(out))
    return bytes(out)


def test_blocks_are_copied_from_where_they_are() -> None:
    theirs, ours = store(1), store(2)
    producer = transport(theirs)
    stage = producer.stage(3 * BLOCK_BYTES, "")
    assert stage is not None
    payload = opened(attached(producer), stage.parcel, 7, 3, 2999)
    assert payload is not None and payload.is_intact()
    assert bytes(host_bytes(payload.content)) == content(theirs, 7, 3, 2999)
    ours.scatter(0, (4, 0, 9), payload.content)
    assert content(ours, 4, 0, 9) == content(theirs, 7, 3, 2999)
    assert content(ours, 5) == content(store(2), 5)
    producer.free(stage.parcel)
    assert not payload.is_intact() and opened(attached(producer), stage.parcel, 7) is None


def test_more_blocks_than_the_kernel_takes_at_a_time() -> None:
    theirs, ours = store(1), store(2)
    producer = transport(theirs)
    stage = producer.stage(2500 * BLOCK_BYTES, "")
    assert stage is not None
    payload = opened(attached(producer), stage.parcel, *range(2500))
    assert payload is not None
    ours.scatter(0, range(400, 2900), payload.content)
    assert content(ours, *range(400, 2900)) == content(theirs, *range(2500))
    producer.close()


def test_a_reader_believes_nothing() -> None:
    producer = transport(store(1))
    stage = producer.stage(BLOCK_BYTES, "")
    assert stage is not None
    inlet, good = attached(producer), stage.parcel
    for parcel in (0, 1, -1, good + 1, 2**63, 10**30):
        assert opened(inlet, parcel, 1) is None, parcel
    assert inlet.open(announced(good, BLOCK_BYTES, Via.CMA), None) is None
    assert inlet.open(announced(good, BLOCK_BYTES, Via.CMA, (1,)), memoryview(b"x")) is None
    for block_id in (-1, 2**40, 2**64):
        outside = opened(inlet, good, block_id)
        assert outside is not None
        with pytest.raises(OSError, match=f"process {os.getpid()}: "):
            host_bytes(outside.content)


def test_only_the_memory_that_was_named_is_attached() -> None:
    producer, reader = transport(store(1)), transport(store(2))
    boot, pid, serials, token, regions = producer.address().split("/")
    good = (boot, pid, serials, token, regions)
    wrong = [
        ("another", pid, serials, token, regions),
        (boot, str(os.getppid()), serials, token, regions),
        (boot, "0", serials, token, regions),
        (boot, "x", serials, token, regions),
        (boot, pid, "0", token, regions),
        (boot, pid, "f" * 20, token, regions),
        (boot, pid, serials, "00" * 16, regions),
        (boot, pid, serials, "nothex", regions),
        (boot, pid, serials, token, regions.partition(",")[0]),
        (boot, pid, serials, token, ""),
        ("",),
    ]
    assert reader.attach("/".join(good)) is not None
    for parts in wrong:
        assert reader.attach("/".join(parts)) is None, parts


def test_serials_are_bounded_and_never_the_same() -> None:
    producer = transport(store(1))
    stages = [producer.stage(1, "") for _ in range(1024)]
    parcels = [stage.parcel for stage in stages if stage is not None]
    assert len(set(parcels)) == 1024 and producer.stage(1, "") is None
    producer.free(parcels[5])
    producer.free(parcels[5])
    again = producer.stage(1, "")
    assert again is not None and again.parcel not in parcels
    assert producer.stage(1, "") is None
