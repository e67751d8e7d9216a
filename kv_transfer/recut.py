"""Blocks of one size made of blocks of another: a producer's chunk, cut anew for its reader."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kv_transfer.layout import GroupLayout, Read, TokenShape, num_blocks_for

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Recut:
    """One pull: our blocks `first_block` to `num_blocks` by position, out of a producer's.

    `theirs` and `ours` have the same token shapes, and one block size divides the other.
    """

    theirs: GroupLayout
    ours: GroupLayout
    first_block: int
    num_blocks: int

    def reads(self, num_tokens: int, chunk_bytes: int, step_tokens: int | None) -> list[Read]:
        """Cut the producer's blocks, of a prompt of `num_tokens`, into reads of about
        `chunk_bytes`; each but the last fills whole blocks of ours.

        With `step_tokens` none is for more than a producer's step finishes.
        """
        size = self.theirs.block_size
        start = self.first_block * self.ours.block_size // size
        end = num_blocks_for(min(num_tokens, self.num_blocks * self.ours.block_size), size)
        step = max(1, chunk_bytes // self.theirs.block_bytes)
        if step_tokens is not None:
            step = max(1, min(step, step_tokens // size))
        whole = max(1, self.ours.block_size // size)
        step = max(whole, step - step % whole)
        return [Read(0, at, min(step, end - at)) for at in range(start, end, step)]

    def place(self, read: Read) -> slice:
        """Return which of our blocks, by position, a read is for."""
        start, end = self._covered(read)
        return slice(max(start, self.first_block), min(end, self.num_blocks))

    def num_bytes(self, read: Read) -> int:
        """Return how much `cut` makes of a read."""
        place = self.place(read)
        return len(range(place.start, place.stop)) * self.ours.block_bytes

    def cut(self, read: Read, payload: memoryview, into: memoryview) -> None:
        """Write the blocks of `place` to `into`, region by region; what is behind the prompt in
        the last one becomes 0."""
        start, end = self._covered(read)
        place = self.place(read)
        kept = slice(place.start - start, place.stop - start)
        num, num_kept = read.num_blocks, kept.stop - kept.start
        theirs, ours = np.frombuffer(payload, np.uint8), np.frombuffer(into, np.uint8)
        regions = zip(
            self.theirs.region_bytes, self.ours.region_bytes, self.ours.shapes, strict=True
        )
        for size, our_size, shape in regions:
            rows, theirs = theirs[: num * size].reshape(num, size), theirs[num * size :]
            part, ours = ours[: num_kept * our_size], ours[num_kept * our_size :]
            part = part.reshape(num_kept, our_size)
            if num_kept == end - start:
                self._fill(part, rows, shape)
            else:
                whole = np.empty((end - start, our_size), np.uint8)
                self._fill(whole, rows, shape)
                part[:] = whole[kept]

    def _covered(self, read: Read) -> tuple[int, int]:
        """Return the positions of our blocks that begin, and end, around a read's tokens."""
        size, our_size = self.theirs.block_size, self.ours.block_size
        start = read.first_block * size // our_size
        return start, num_blocks_for((read.first_block + read.num_blocks) * size, our_size)

    def _fill(self, fresh: Bytes, rows: Bytes, shape: TokenShape) -> None:
        """Copy every token of `rows`, blocks [num, bytes] of theirs, to its place in ours."""
        begin, our_begin = 0, 0
        for outer, inner in shape.parts:
            size = outer * inner * self.theirs.block_size
            our_size = outer * inner * self.ours.block_size
            source = _part(rows, shape, begin, size).reshape(len(rows), shape.heads, outer, -1)
            target = _part(fresh, shape, our_begin, our_size)
            target = target.reshape(len(fresh), shape.heads, outer, -1)
            _copy(source, target)
            begin, our_begin = begin + size, our_begin + our_size


def _part(rows: Bytes, shape: TokenShape, begin: int, size: int) -> Bytes:
    """Return one part of every head of every block [num, heads, bytes], without copying."""
    return rows.reshape(len(rows), shape.heads, -1)[:, :, begin : begin + size]


def _copy(source: Bytes, target: Bytes) -> None:
    """Move runs of tokens, [num, heads, outer, bytes of a block's tokens] on both sides."""
    run = math.gcd(source.shape[3], target.shape[3])
    num, heads, outer, _ = source.shape
    per_source, per_target = source.shape[3] // run, target.shape[3] // run
    if per_source > 1:
        runs = source.reshape(num, heads, outer, per_source, run).transpose(0, 3, 1, 2, 4)
        target.reshape(num, per_source, heads, outer, run)[:] = runs
        return
    num_whole = num // per_target
    split = target.reshape(len(target), heads, outer, per_target, run).transpose(0, 3, 1, 2, 4)
    split[:num_whole] = source[: num_whole * per_target].reshape(
        num_whole, per_target, heads, outer, run
    )
    rest = source[num_whole * per_target :]
    split[num_whole:, : len(rest)] = rest
    split[num_whole:, len(rest) :] = 0
