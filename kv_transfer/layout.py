"""Arithmetic of KV blocks: what one block holds, when two layouts agree, how reads are cut.

A *region* is one contiguous array of blocks (a layer's K and V, or one of them); a *group*
is the regions that share a block table (vLLM's KV cache group). One transferred block is the
same block index out of every region of its group, in region order.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.pairing import CacheLayout


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One block table: tokens per block, and the bytes a block has in each region."""

    block_size: int
    region_bytes: tuple[int, ...]

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
    def fingerprint(self) -> str:
        """Return 128 bits that differ whenever blocks of one cannot be read by the other."""
        digest = hashlib.sha256()
        for key in sorted(self.identity):
            digest.update(f"{key}={self.identity[key]}\n".encode())
        for group in self.groups:
            digest.update(f"{group.block_size}:{group.region_bytes}\n".encode())
        return digest.hexdigest()[:32]

    def outline(self) -> CacheLayout:
        """Return the fingerprint with what it is of, so that a difference can be named."""

        def words(values: Iterable[object]) -> str:
            return "+".join(map(str, values))

        facts = {
            "block_size": words(group.block_size for group in self.groups),
            "regions": words(len(group.region_bytes) for group in self.groups),
            "block_bytes": words(group.block_bytes for group in self.groups),
        }
        return CacheLayout(self.fingerprint, {**self.identity, **facts})


@dataclass(frozen=True, slots=True)
class Read:
    """A run of blocks: positions `first_block` to `first_block + num_blocks` of a group."""

    group: int
    first_block: int
    num_blocks: int


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
    and at most what a producer's step of `step_tokens` finishes: a read waits for all of it.

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
    return reads
