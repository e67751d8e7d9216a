"""KV-plane messages for tests that are about something else than what they say."""

from cluster.names import HandoffId
from kv_transfer.protocol import Blocks, Via


def announced(
    parcel: int, num_bytes: int, via: Via = Via.SHM, block_ids: tuple[int, ...] = ()
) -> Blocks:
    """Return what says of one block, or of `block_ids`, that it is in `parcel`."""
    num_blocks = len(block_ids) or 1
    name = HandoffId("h")
    return Blocks(name, 0, 0, num_blocks, num_bytes, None, 1, via, parcel, block_ids=block_ids)
