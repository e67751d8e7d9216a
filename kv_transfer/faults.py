"""Faults put in on purpose, so that tests can show that real engines notice them.

Chosen by `handoff.fault` in the configuration, so that an engine's own processes take part.
"""

from typing import Literal

from kv_transfer.consumer import Damage
from kv_transfer.layout import BlockLayout, Read

# Flips a sign, the exponent's lowest bit or a mantissa bit of any float: wrong, seldom NaN.
_FLIPPED = bytes(byte ^ 0x80 for byte in range(256))


def damage_of(
    fault: Literal["none", "corrupt_received_block"], layout: BlockLayout
) -> Damage | None:
    """Return what happens to each chunk between the wire and the check of its checksum."""
    if fault == "none":
        return None
    return lambda read, payload: corrupt_block(layout, read, payload)


def corrupt_block(layout: BlockLayout, read: Read, payload: memoryview) -> memoryview:
    """Return a copy of a chunk whose first block is damaged in every region."""
    damaged = bytearray(payload)
    start = 0
    for size in layout.groups[read.group].region_bytes:
        damaged[start : start + size] = damaged[start : start + size].translate(_FLIPPED)
        start += size * read.num_blocks
    return memoryview(damaged)
