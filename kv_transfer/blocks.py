"""Where block bytes live: the two operations a hand-off needs of an engine's memory."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from kv_transfer.layout import BlockLayout


class BlockStore(Protocol):
    """One engine's KV blocks."""

    layout: BlockLayout
    total_bytes: int

    def gather(self, group: int, block_ids: Sequence[int], into: memoryview) -> None:
        """Copy the blocks to `into`, region by region; it has just their size."""
        ...

    def scatter(self, group: int, block_ids: Sequence[int], payload: memoryview) -> None:
        """Write what `gather` copied elsewhere into these blocks."""
        ...


class HostBlockStore:
    """Blocks in plain host memory, without numpy: the simulated engine's, a few KiB each."""

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self.total_bytes = num_blocks * sum(group.block_bytes for group in layout.groups)
        self._regions = [
            [memoryview(bytearray(num_blocks * size)) for size in group.region_bytes]
            for group in layout.groups
        ]

    def gather(self, group: int, block_ids: Sequence[int], into: memoryview) -> None:
        offset = 0
        for region, size in self._sized(group):
            for block_id in block_ids:
                into[offset : offset + size] = region[block_id * size : (block_id + 1) * size]
                offset += size

    def scatter(self, group: int, block_ids: Sequence[int], payload: memoryview) -> None:
        offset = 0
        for region, size in self._sized(group):
            for block_id in block_ids:
                region[block_id * size : (block_id + 1) * size] = payload[offset : offset + size]
                offset += size

    def _sized(self, group: int) -> Iterator[tuple[memoryview, int]]:
        return zip(self._regions[group], self.layout.groups[group].region_bytes, strict=True)
