"""Where block bytes live: the two operations a hand-off needs of an engine's memory."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from kv_transfer.layout import BlockLayout


class BlockStore(Protocol):
    """One engine's KV blocks; both calls release the GIL for large payloads."""

    layout: BlockLayout

    def gather(self, group: int, block_ids: Sequence[int]) -> memoryview:
        """Return a copy of the blocks, region by region, as bytes."""
        ...

    def scatter(self, group: int, block_ids: Sequence[int], payload: memoryview) -> None:
        """Write what `gather` returned elsewhere into these blocks."""
        ...


class HostBlockStore:
    """Blocks in plain host memory, without torch: the simulated engine's."""

    def __init__(self, layout: BlockLayout, num_blocks: int) -> None:
        self.layout = layout
        self._regions = [
            [memoryview(bytearray(num_blocks * size)) for size in group.region_bytes]
            for group in layout.groups
        ]

    def gather(self, group: int, block_ids: Sequence[int]) -> memoryview:
        payload = bytearray()
        for region, size in self._sized(group):
            for block_id in block_ids:
                payload += region[block_id * size : (block_id + 1) * size]
        return memoryview(payload)

    def scatter(self, group: int, block_ids: Sequence[int], payload: memoryview) -> None:
        offset = 0
        for region, size in self._sized(group):
            for block_id in block_ids:
                region[block_id * size : (block_id + 1) * size] = payload[offset : offset + size]
                offset += size

    def _sized(self, group: int) -> Iterator[tuple[memoryview, int]]:
        return zip(self._regions[group], self.layout.groups[group].region_bytes, strict=True)
