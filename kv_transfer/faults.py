"""Faults put in on purpose, so that tests can show that real engines notice them.

Chosen by `handoff.fault` in the configuration, so that an engine's own processes take part.
"""

from itertools import accumulate
from typing import Literal

from kv_transfer.blocks import Content, Elsewhere
from kv_transfer.consumer import Damage
from kv_transfer.layout import BlockLayout, Read

# Flips a sign, the exponent's lowest bit or a mantissa bit of any float: wrong, seldom NaN.
_FLIP = 0x80
_FLIPPED = bytes(byte ^ _FLIP for byte in range(256))


def damage_of(
    fault: Literal["none", "corrupt_received_block"], layout: BlockLayout
) -> Damage | None:
    """Return what happens to each chunk between the wire and the check of its checksum."""
    if fault == "none":
        return None
    return lambda read, payload: corrupt_block(layout, read, payload)


def corrupt_block(layout: BlockLayout, read: Read, payload: Content) -> Content:
    """Return a copy of a chunk whose first block is damaged in every region."""
    starts = accumulate(
        (size * read.num_blocks for size in layout.groups[read.group].region_bytes), initial=0
    )
    parts = [
        slice(start, start + size)
        for start, size in zip(starts, layout.groups[read.group].region_bytes, strict=False)
    ]
    if isinstance(payload, Elsewhere):
        payload = payload.fetch()
    if not isinstance(payload, memoryview):
        tensor = payload.clone()
        for part in parts:
            tensor[part].bitwise_xor_(_FLIP)
        return tensor
    damaged = bytearray(payload)
    for part in parts:
        damaged[part] = damaged[part].translate(_FLIPPED)
    return memoryview(damaged)
