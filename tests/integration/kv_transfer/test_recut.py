"""A producer's blocks read by an engine with larger or smaller ones: each token in its place."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from kv_transfer.array_blocks import ArrayBlockStore, Bytes
from kv_transfer.consumer import Pull
from kv_transfer.layout import BlockLayout, GroupLayout, TokenShape, num_blocks_for
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from kv_transfer.recut import Recut
from tests.waiting import wait_for

# K by channels and V by tokens in each of two heads, as on a CPU; tokens whole, as in MLA.
SHAPES = (TokenShape(2, ((3, 4), (1, 12))), TokenShape(1, ((1, 10),)))
NUM_BLOCKS = 40
UNTOUCHED = 0xEE


class Engine:
    """Blocks of one size; tokens are written and read one by one, as the shapes say."""

    def __init__(self, block_size: int, seed: int) -> None:
        self.block_size = block_size
        self.group = GroupLayout.of_tokens(block_size, SHAPES)
        self.layout = BlockLayout((self.group,), {"model": "m"})
        self.regions: list[Bytes] = [
            np.full((NUM_BLOCKS, size), UNTOUCHED, np.uint8) for size in self.group.region_bytes
        ]
        self.store = ArrayBlockStore(self.layout, [self.regions])
        rng = np.random.default_rng(seed)
        self.block_ids = [int(n) for n in 1 + rng.permutation(NUM_BLOCKS - 1)]

    def cells(self, position: int) -> list[Bytes]:
        """Return a token's bytes, piece by piece, as views into the blocks."""
        block, at = self.block_ids[position // self.block_size], position % self.block_size
        found = []
        for region, shape in zip(self.regions, SHAPES, strict=True):
            begin = 0
            for _head in range(shape.heads):
                for outer, inner in shape.parts:
                    for number in range(outer):
                        start = begin + (number * self.block_size + at) * inner
                        found.append(region[block, start : start + inner])
                    begin += outer * inner * self.block_size
        return found

    def write(self, tokens: range) -> None:
        rng = np.random.default_rng(7)
        for position in tokens:
            for cell in self.cells(position):
                cell[:] = rng.integers(0, 256, len(cell), np.uint8)

    def read(self, position: int) -> bytes:
        return b"".join(cell.tobytes() for cell in self.cells(position))

    def table(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self.block_ids[: num_blocks_for(num_tokens, self.block_size)])


def hand_over(producer: Engine, consumer: Engine, num_tokens: int, first: int, chunk: int) -> None:
    """Gather, cut and scatter what `Recut` plans."""
    theirs, ours = producer.table(num_tokens), consumer.table(num_tokens)
    recut = Recut(producer.group, consumer.group, first, len(ours))
    covered: list[int] = []
    for read in recut.reads(num_tokens, chunk, None):
        wanted = theirs[read.first_block : read.first_block + read.num_blocks]
        assert len(wanted) == read.num_blocks, "no read is beyond what is held"
        payload = bytearray(read.num_blocks * producer.group.block_bytes)
        producer.store.gather(0, wanted, memoryview(payload))
        place = recut.place(read)
        covered += range(place.start, place.stop)
        fresh = memoryview(bytearray(b"\xdd" * recut.num_bytes(read)))
        recut.cut(read, memoryview(bytes(payload)), fresh)
        consumer.store.scatter(0, ours[place], fresh)
    assert covered == list(range(first, len(ours))), "each of ours once, in order"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from([(4, 16), (16, 4), (8, 16), (16, 8), (6, 12), (12, 6), (8, 8), (1, 8)]),
    num_tokens=st.integers(1, 90),
    chunk=st.integers(1, 3000),
    data=st.data(),
)
def test_every_token_arrives_where_it_belongs(
    sizes: tuple[int, int], num_tokens: int, chunk: int, data: st.DataObject
) -> None:
    producer, consumer = Engine(sizes[0], 1), Engine(sizes[1], 2)
    limit = NUM_BLOCKS - 1
    num_tokens = min(num_tokens, limit * min(sizes))
    first = data.draw(st.integers(0, num_tokens // consumer.block_size), label="blocks there")
    producer.write(range(num_tokens))
    hand_over(producer, consumer, num_tokens, first, chunk)
    for position in range(first * consumer.block_size, num_tokens):
        assert consumer.read(position) == producer.read(position), position
    sent = num_blocks_for(num_tokens, producer.block_size) * producer.block_size
    for position in range(sent, len(consumer.table(num_tokens)) * consumer.block_size):
        if position >= first * consumer.block_size:
            assert not any(consumer.read(position)), "behind the prompt is nothing"
    kept = [b for b in range(NUM_BLOCKS) if b not in consumer.table(num_tokens)[first:]]
    assert all((region[kept] == UNTOUCHED).all() for region in consumer.regions)


def pulled(
    producer: Engine, consumer: Engine, num_tokens: int, way: str = "tcp", **changes: int
) -> EndedPull:
    """Hand a prompt over between two ports; the first two of the consumer's blocks are there."""
    section = HandoffSection(chunk_bytes=400, transports=way)
    ports = [HandoffPort(engine.store, section, 1) for engine in (producer, consumer)]
    try:
        held, wanted = producer.table(num_tokens), consumer.table(num_tokens)
        offer = Offer(
            HandoffId("h"),
            WorkerId("p"),
            1,
            producer.layout.fingerprint,
            (ports[0].endpoint,),
            num_tokens,
            len(held),
            30.0,
            producer.block_size,
        )
        ports[0].hold(Hold(offer.handoff_id, "h", (held,)))
        ports[1].pull(Pull("h", replace(offer, **changes), (wanted,), (2,)))  # type: ignore[arg-type]
        ended: list[EndedPull] = []

        def has_ended() -> Sequence[EndedPull]:
            ended.extend(ports[1].take_pulls())
            return ended

        wait_for(has_ended)
        return ended[0]
    finally:
        for port in ports:
            port.close()


@pytest.mark.parametrize("way", ["cma", "shm", "tcp"])
@pytest.mark.parametrize("sizes", [(4, 16), (16, 4)])
def test_ports_of_two_block_sizes_hand_over(sizes: tuple[int, int], way: str) -> None:
    producer, consumer = Engine(sizes[0], 1), Engine(sizes[1], 2)
    producer.write(range(77))
    ended = pulled(producer, consumer, 77, way)
    assert ended.failure is None and ended.receipt.transport == way
    assert ended.receipt.received_bytes == ended.receipt.produced_bytes > 0
    for position in range(2 * consumer.block_size, 77):
        assert consumer.read(position) == producer.read(position), position
    assert (consumer.regions[0][consumer.block_ids[:2]] == UNTOUCHED).all()


@pytest.mark.parametrize("size", [0, -4, 3, 24])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    ended = pulled(Engine(4, 1), Engine(16, 2), 77, block_size=size)
    assert ended.failure == f"blocks of {size} tokens of p cannot be cut"


def test_layouts_say_which_sizes_fit() -> None:
    small, large, odd = (Engine(size, 0).layout for size in (4, 16, 12))
    assert small.fingerprint == large.fingerprint != odd.fingerprint
    assert small.outline().facts["block_size"] == "1 * 2^n"
    assert odd.outline().facts["block_size"] == "3 * 2^n"
    uncut = BlockLayout((GroupLayout(16, large.groups[0].region_bytes),), {"model": "m"})
    assert uncut.fingerprint != large.fingerprint
    two = (BlockLayout((*layout.groups, *layout.groups), {}) for layout in (small, large))
    assert len({layout.fingerprint for layout in two}) == 2, "of several tables none is cut"
