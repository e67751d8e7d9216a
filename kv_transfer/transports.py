"""The transports of one port, by the names its configuration gives them."""

from collections.abc import Callable

from cluster.config import HandoffSection
from kv_transfer.arena import ArenaShape
from kv_transfer.blocks import BlockStore
from kv_transfer.protocol import Via
from kv_transfer.shm import ShmTransport
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import Transport


def arena_shape(section: HandoffSection, store: BlockStore) -> ArenaShape:
    """Return an arena whose slots hold a chunk each; a small store needs a small one."""
    largest_block = max(group.block_bytes for group in store.layout.groups)
    chunk_bytes = max(largest_block, min(section.chunk_bytes, store.total_bytes))
    return ArenaShape.for_chunks(chunk_bytes, min(section.arena_mib << 20, store.total_bytes))


def transports_of(section: HandoffSection, shape: ArenaShape) -> dict[Via, Transport]:
    """Return what `section` names, in its order."""
    kinds: dict[Via, Callable[[ArenaShape], Transport]] = {
        Via.SHM: ShmTransport,
        Via.TCP: lambda shape: TcpTransport(shape.num_slots),
    }
    return {Via(name): kinds[Via(name)](shape) for name in section.transports}
