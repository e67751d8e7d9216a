"""Blocks that travel with one byte per number, whatever the engine keeps them in.

Numbers that follow each other in a block share a scale, the largest of them divided by the
largest that the byte can say. Where a byte cannot say a number its neighbour comes back: this is
for networks that are slower than the rounding is dear (`make bench-wire` says how dear).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from kv_transfer.blocks import BlockStore, Content, Memory, host_bytes
from kv_transfer.layout import BlockLayout, GroupLayout

WireDtype = Literal["int8", "fp8"]
_BYTES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
# Numbers per scale, at most: with blocks of 128 tokens one channel of K where a backend stores K
# by channels, and one or two tokens of one head where it stores them by tokens.
_MOST_PER_SCALE = 128
_SCALE_BYTES = 4


class PackedBlockStore:
    """Another store's blocks, packed as they are gathered and unpacked as they are scattered.

    `dtypes` are the inner store's, by group and region. In a region's part of a payload the scales
    of all its blocks come before their bytes.
    """

    def __init__(
        self,
        inner: BlockStore,
        dtypes: Sequence[Sequence[torch.dtype]],
        wire_dtype: WireDtype,
    ) -> None:
        """Raise `ValueError` for numbers that have but one byte already, or are no floats."""
        if wrong := {str(d) for group in dtypes for d in group if d not in _WIDE}:
            raise ValueError(f"a KV cache of {'+'.join(sorted(wrong))} cannot go as {wire_dtype}")
        self.device: str | None = None
        self._inner = inner
        self._dtypes = dtypes
        self._byte, self._most = _BYTES[wire_dtype]
        self._plain = bytearray()
        self._arrived = bytearray()
        groups = tuple(
            GroupLayout(group.block_size, tuple(map(_packed_bytes, group.region_bytes, kinds)))
            for group, kinds in zip(inner.layout.groups, dtypes, strict=True)
        )
        self.layout = BlockLayout(groups, inner.layout.identity)
        sizes = zip(groups, inner.layout.groups, strict=True)
        ratio = max(ours.block_bytes / theirs.block_bytes for ours, theirs in sizes)
        self.total_bytes = math.ceil(inner.total_bytes * ratio)

    def gather(self, group: int, block_ids: Sequence[int], into: Memory) -> None:
        wire = host_bytes(into)
        plain = self._take_plain(group, len(block_ids))
        self._inner.gather(group, block_ids, plain)
        for numbers, scales, packed in self._parts(group, len(block_ids), plain, wire):
            wide = numbers.float()
            torch.amax(wide.abs(), 1, keepdim=True, out=scales)
            scales.div_(self._most)
            scaled = wide / torch.where(scales == 0, 1.0, scales)
            packed.copy_(scaled.round_() if self._byte is torch.int8 else scaled)

    def scatter(self, group: int, block_ids: Sequence[int], payload: Content) -> None:
        plain = self._take_plain(group, len(block_ids))
        self._arrived = _at_least(self._arrived, payload.nbytes)
        # A payload may be read-only, which torch has no word for.
        arrived = memoryview(self._arrived)[: payload.nbytes]
        arrived[:] = host_bytes(payload)
        for numbers, scales, packed in self._parts(group, len(block_ids), plain, arrived):
            numbers.copy_(packed.float().mul_(scales))
        self._inner.scatter(group, block_ids, plain)

    def checksum(self, payload: Content) -> int:
        return self._inner.checksum(payload)

    def regions(self) -> None:
        return None

    def _take_plain(self, group: int, num_blocks: int) -> memoryview:
        """Return room for the blocks as the engine has them; the next call may reuse it."""
        num_bytes = num_blocks * self._inner.layout.groups[group].block_bytes
        self._plain = _at_least(self._plain, num_bytes)
        return memoryview(self._plain)[:num_bytes]

    def _parts(
        self, group: int, num_blocks: int, plain: memoryview, wire: memoryview
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield each region's numbers and bytes [scales, numbers per scale], and its scales."""
        begin, begin_wire = 0, 0
        sizes = self._inner.layout.groups[group].region_bytes
        for size, dtype in zip(sizes, self._dtypes[group], strict=True):
            num_numbers, per_scale = _cut(size, dtype)
            num_scales = num_blocks * num_numbers // per_scale
            end = begin + num_blocks * size
            end_scales = begin_wire + num_scales * _SCALE_BYTES
            end_wire = end_scales + num_blocks * num_numbers
            yield (
                torch.frombuffer(plain[begin:end], dtype=dtype).view(num_scales, per_scale),
                torch.frombuffer(wire[begin_wire:end_scales], dtype=torch.float32).view(-1, 1),
                torch.frombuffer(wire[end_scales:end_wire], dtype=self._byte).view(
                    num_scales, per_scale
                ),
            )
            begin, begin_wire = end, end_wire


def _cut(region_bytes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many numbers a block has in a region, and how many of them share a scale."""
    num_numbers = region_bytes // dtype.itemsize
    return num_numbers, math.gcd(num_numbers, _MOST_PER_SCALE)


def _packed_bytes(region_bytes: int, dtype: torch.dtype) -> int:
    num_numbers, per_scale = _cut(region_bytes, dtype)
    return num_numbers + num_numbers // per_scale * _SCALE_BYTES


def _at_least(buffer: bytearray, num_bytes: int) -> bytearray:
    """Return `buffer` if it is large enough: pages touched for the first time are slow."""
    return buffer if len(buffer) >= num_bytes else bytearray(num_bytes)
