"""Blocks that travel with a byte per number: how close they come, how large they are, who pairs."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from cluster.pairing import mismatch
from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import BlockStore
from kv_transfer.consumer import Pull
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.packed_blocks import PackedBlockStore, WireDtype
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from tests.waiting import wait_for

NUM_BLOCKS = 24
# Largest error of a number, as a share of the largest that has its scale.
TOLERANCE = {"int8": 0.5 / 127, "fp8": 1 / 16}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Cache:
    """Blocks of one group with two regions, of 512 and 192 numbers a block."""

    def __init__(self, dtype: torch.dtype, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.regions = [
            (torch.randn(NUM_BLOCKS, size, generator=generator) * scale).to(dtype)
            for size in (512, 192)
        ]

    def plain(self, wire_dtype: str = "as_is") -> ArrayBlockStore:
        rows = [region.view(torch.uint8).numpy() for region in self.regions]
        group = GroupLayout(16, tuple(row.shape[1] for row in rows))
        identity = {"model": "m", "wire_dtype": wire_dtype}
        return ArrayBlockStore(BlockLayout((group,), identity), [rows])

    def packed(self, wire_dtype: WireDtype) -> PackedBlockStore:
        return PackedBlockStore(
            self.plain(wire_dtype), [[region.dtype for region in self.regions]], wire_dtype
        )


def assert_close(sent: Cache, got: Cache, ids: Sequence[int], at: Sequence[int], wire: str) -> None:
    """Each number came back within what a byte can say of its neighbourhood."""
    for theirs, ours in zip(sent.regions, got.regions, strict=True):
        wanted, found = theirs[list(ids)].double(), ours[list(at)].double()
        groups = np.gcd(wanted.shape[1], 128)
        most = wanted.view(len(ids), -1, groups).abs().amax(2, keepdim=True)
        error = (wanted - found).view(len(ids), -1, groups).abs()
        limit = most * (TOLERANCE[wire] + ROUNDING[theirs.dtype]) * 1.001
        assert bool((error <= limit).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    wire=st.sampled_from(["int8", "fp8"]),
    ids=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=6, unique=True),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_any_blocks_come_close(
    dtype: torch.dtype, wire: WireDtype, ids: list[int], scale: float, seed: int
) -> None:
    sent, got = Cache(dtype, seed, scale), Cache(dtype, seed + 1)
    untouched = [region.clone() for region in got.regions]
    at = random.Random(seed).sample(range(NUM_BLOCKS), len(ids))
    producer, consumer = sent.packed(wire), got.packed(wire)
    payload = bytearray(len(ids) * producer.layout.groups[0].block_bytes)
    producer.gather(0, ids, memoryview(payload))
    consumer.scatter(0, at, memoryview(bytes(payload)))
    assert_close(sent, got, ids, at, wire)
    others = [block for block in range(NUM_BLOCKS) if block not in at]
    for before, after in zip(untouched, got.regions, strict=True):
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.2585), (torch.bfloat16, 0.517)])
def test_blocks_travel_in_a_byte_per_number_and_scales(dtype: torch.dtype, share: float) -> None:
    cache = Cache(dtype, 0)
    plain, packed = cache.plain(), cache.packed("int8")
    ratio = packed.layout.groups[0].block_bytes / plain.layout.groups[0].block_bytes
    assert ratio == pytest.approx(share, abs=0.005)
    assert packed.total_bytes == pytest.approx(plain.total_bytes * ratio, abs=1)


def test_numbers_of_a_byte_are_refused() -> None:
    rows = [torch.zeros(4, 64, dtype=torch.uint8).numpy()]
    store = ArrayBlockStore(BlockLayout((GroupLayout(16, (64,)),), {}), [rows])
    with pytest.raises(ValueError, match=r"a KV cache of torch\.uint8 cannot go as int8"):
        PackedBlockStore(store, [[torch.uint8]], "int8")


@contextmanager
def ports(*stores: BlockStore) -> Iterator[list[HandoffPort]]:
    opened = [HandoffPort(store, HandoffSection(chunk_bytes=2000), 1) for store in stores]
    try:
        yield opened
    finally:
        for port in opened:
            port.close()


def pulled(producer: HandoffPort, consumer: HandoffPort, fingerprint: str) -> EndedPull:
    """Hand blocks 3, 9, 4 over into 1, 2, 7 and return how it ended."""
    endpoints = (producer.endpoint,)
    offer = Offer(HandoffId("h"), WorkerId("p"), 1, fingerprint, endpoints, 48, 3, 30.0)
    producer.hold(Hold(offer.handoff_id, "h", ((3, 9, 4),)))
    consumer.pull(Pull("h", offer, ((1, 2, 7),), (0,)))
    ended: list[EndedPull] = []

    def has_ended() -> bool:
        ended.extend(consumer.take_pulls())
        return bool(ended)

    wait_for(has_ended)
    return ended[0]


def test_a_pull_brings_them_over_real_sockets() -> None:
    sent, got = Cache(torch.float32, 1), Cache(torch.float32, 2)
    producer, consumer = sent.packed("int8"), got.packed("int8")
    with ports(producer, consumer) as (theirs, ours):
        ended = pulled(theirs, ours, producer.layout.fingerprint)
    assert ended.failure is None
    assert ended.receipt.received_bytes == 3 * producer.layout.groups[0].block_bytes
    assert_close(sent, got, (3, 9, 4), (1, 2, 7), "int8")


def test_one_who_does_not_pack_is_no_peer() -> None:
    plain, packed = Cache(torch.float32, 1).plain(), Cache(torch.float32, 2).packed("fp8")
    reason = mismatch(
        (WorkerId("p"), plain.layout.outline()), (WorkerId("d"), packed.layout.outline())
    )
    assert reason is not None and "wire_dtype is as_is on p, fp8 on d" in reason
    with ports(plain, packed) as (theirs, ours):
        ended = pulled(theirs, ours, plain.layout.fingerprint)
    assert ended.failure is not None and "is not this engine's" in ended.failure
