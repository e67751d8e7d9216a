"""Arithmetic of KV blocks: what one block holds, when two layouts agree, how reads are cut.

A *region* is one contiguous array of blocks (a layer's K and V, or one of them); a *group*
is the regions that share a block table (vLLM's KV cache group). One transferred block is the
same block index out of every region of its group, in region order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cluster.pairing import CacheLayout


@dataclass(frozen=True, slots=True)
class TokenShape:
    """Where a block has its tokens in one region: `heads` times, one part after the other, each
    part [outer, tokens of the block, inner bytes]."""

    heads: int
    parts: tuple[tuple[int, int], ...]

    def block_bytes(self, block_size: int) -> int:
        return self.heads * block_size * sum(outer * inner for outer, inner in self.parts)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One block table: tokens per block, and the bytes a block has in each region.

    `shapes`, by region, are known where blocks can be cut into tokens; else there are none.
    """

    block_size: int
    region_bytes: tuple[int, ...]
    shapes: tuple[TokenShape, ...] = ()

    @classmethod
    def of_tokens(cls, block_size: int, shapes: Sequence[TokenShape]) -> Self:
        """Return the group whose regions have these shapes."""
        region_bytes = tuple(shape.block_bytes(block_size) for shape in shapes)
        return cls(block_size, region_bytes, tuple(shapes))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return sum(self.region_bytes)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Every group of an engine, and what else must agree between two engines."""

    groups: tuple[GroupLayout, ...]
    identity: Mapping[str, str | int]

    @property
    def is_recuttable(self) -> bool:
        """Whether others may have larger or smaller blocks: block tables of one kind, of tokens."""
        return len(self.groups) == 1 and bool(self.groups[0].shapes)

    @property
    def fingerprint(self) -> str:
        """Return 128 bits that differ whenever blocks of one cannot be read by the other."""
        digest = hashlib.sha256()
        for key in sorted(self.identity):
            digest.update(f"{key}={self.identity[key]}\n".encode())
        for group in self.groups:
            content = group.shapes if self.is_recuttable else group.region_bytes
            digest.update(f"{self._size_words(group)}:{content}\n".encode())
        return digest.hexdigest()[:32]

    def reads(self, block_size: int) -> bool:
        """Whether blocks of that many tokens can be had from another engine."""
        ours = self.groups[0].block_size
        if block_size == ours or not self.is_recuttable:
            return block_size == ours
        return block_size > 0 and max(ours, block_size) % min(ours, block_size) == 0

    def _size_words(self, group: GroupLayout) -> str:
        """Return which block sizes a group's blocks can be read in: one of any two divides the
        other."""
        if not self.is_recuttable:
            return str(group.block_size)
        odd = group.block_size // (group.block_size & -group.block_size)
        return f"{odd} * 2^n"

    def outline(self) -> CacheLayout:
        """Return the fingerprint with what it is of, so that a difference can be named."""

        def words(values: Iterable[object]) -> str:
            return "+".join(map(str, values))

        facts = {
            "block_size": words(map(self._size_words, self.groups)),
            "regions": words(len(group.region_bytes) for group in self.groups),
        }
        if self.is_recuttable:
            facts["token_bytes"] = words(g.block_bytes // g.block_size for g in self.groups)
        else:
            facts["block_bytes"] = words(group.block_bytes for group in self.groups)
        return CacheLayout(self.fingerprint, {**self.identity, **facts})


@dataclass(frozen=True, slots=True)
class Read:
    """A run of blocks: positions `first_block` to `first_block + num_blocks` of a group."""

    group: int
    first_block: int
    num_blocks: int

    def is_followed_by(self, other: "Read", most_blocks: int) -> bool:
        """Whether the two make one run, of `most_blocks` at most."""
        end = self.group, self.first_block + self.num_blocks
        is_next = (other.group, other.first_block) == end
        return is_next and self.num_blocks + other.num_blocks <= most_blocks


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold `num_tokens`."""
    return -(-num_tokens // block_size)


def _runs(block_ids: Sequence[int], first_block: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of positions from `first_block` that have a block; 0 is vLLM's null."""
    start: int | None = None
    for position in range(first_block, len(block_ids)):
        if block_ids[position] == 0:
            if start is not None:
                yield start, position
            start = None
        elif start is None:
            start = position
    if start is not None:
        yield start, len(block_ids)


def plan_reads(
    layout: BlockLayout,
    block_ids: Sequence[Sequence[int]],
    first_blocks: Sequence[int],
    chunk_bytes: int,
    step_tokens: int | None = None,
) -> list[Read]:
    """Cut the blocks to fetch, per group, into reads of about `chunk_bytes`, at least a block,
    and at most what a producer's step of `step_tokens` finishes: a read waits for all of it. They
    are in the order in which a producer finishes them.

    `block_ids[g]` are the local blocks by position; positions below `first_blocks[g]` are
    there already, and null blocks (outside a sliding window) are not fetched.
    """
    reads: list[Read] = []
    for group, ids in enumerate(block_ids):
        facts = layout.groups[group]
        step = max(1, chunk_bytes // facts.block_bytes)
        if step_tokens is not None:
            step = max(1, min(step, step_tokens // facts.block_size))
        for start, end in _runs(ids, first_blocks[group]):
            cuts = range(start, end, step)
            reads += [Read(group, cut, min(step, end - cut)) for cut in cuts]

    def last_token(read: Read) -> int:
        return (read.first_block + read.num_blocks) * layout.groups[read.group].block_size

    return sorted(reads, key=last_token)
