"""Where block bytes live: the two operations a hand-off needs of an engine's memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import xxhash

from kv_transfer.layout import BlockLayout

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Elsewhere(Protocol):
    """Bytes that are not in this process's memory yet."""

    nbytes: int

    def fetch(self) -> memoryview:
        """Return a copy; raise `OSError`."""
        ...


# Bytes of the host, or of a device: a flat tensor of them, which only stores of tensors take.
Memory: TypeAlias = "memoryview | torch.Tensor"
# What can be read into blocks.
Content: TypeAlias = "Memory | Elsewhere"


@dataclass(frozen=True, slots=True)
class Region:
    """Where block 0 of a region is in its process, how many bytes on the next one is, and how many
    bytes of it are the block's."""

    address: int
    stride: int
    size: int


# By group and region, in the layout's order.
Regions: TypeAlias = Sequence[Sequence[Region]]


class BlockStore(Protocol):
    """One engine's KV blocks. `device` has a name if they are tensors."""

    layout: BlockLayout
    total_bytes: int
    device: str | None

    def gather(self, group: int, block_ids: Sequence[int], into: Memory) -> None:
        """Copy the blocks to `into`, region by region; it has just their size."""
        ...

    def scatter(self, group: int, block_ids: Sequence[int], payload: Content) -> None:
        """Write what `gather` copied elsewhere into these blocks."""
        ...

    def checksum(self, payload: Content) -> int:
        """Return 64 bits that tell these bytes from others; the same on both sides of a way."""
        ...

    def regions(self) -> Regions | None:
        """Return where the blocks are, None if others cannot copy them as they are."""
        ...


def host_bytes(memory: Content) -> memoryview:
    """Return `memory` where only the host's is expected; raise `TypeError`, and `OSError` for
    what cannot be fetched."""
    if isinstance(memory, memoryview):
        return memory
    if isinstance(memory, Elsewhere):
        return memory.fetch()
    raise TypeError(f"{memory.device} memory for blocks that are not tensors")


def host_checksum(payload: memoryview) -> int:
    """Return xxh3-64 of the payload."""
    return xxhash.xxh3_64_intdigest(payload)


class HostBlockStore:
    """Blocks in plain host memory, without numpy: the simulated engine's, a few KiB each."""

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self.device: str | None = None
        self.total_bytes = num_blocks * sum(group.block_bytes for group in layout.groups)
        self._regions = [
            [memoryview(bytearray(num_blocks * size)) for size in group.region_bytes]
            for group in layout.groups
        ]

    def gather(self, group: int, block_ids: Sequence[int], into: Memory) -> None:
        offset, out = 0, host_bytes(into)
        for region, size in self._sized(group):
            for block_id in block_ids:
                out[offset : offset + size] = region[block_id * size : (block_id + 1) * size]
                offset += size

    def scatter(self, group: int, block_ids: Sequence[int], payload: Content) -> None:
        offset, content = 0, host_bytes(payload)
        for region, size in self._sized(group):
            for block_id in block_ids:
                region[block_id * size : (block_id + 1) * size] = content[offset : offset + size]
                offset += size

    def checksum(self, payload: Content) -> int:
        return host_checksum(host_bytes(payload))

    def regions(self) -> None:
        return None

    def _sized(self, group: int) -> Iterator[tuple[memoryview, int]]:
        return zip(self._regions[group], self.layout.groups[group].region_bytes, strict=True)
