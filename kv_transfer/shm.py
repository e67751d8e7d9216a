"""Payloads through memory that two processes of one host share: one copy in, one copy out.

Elsewhere, and for other users, attaching fails and another transport is used.
"""

import random

from kv_transfer.arena import Arena, ArenaInlet, ArenaShape, ArenaTransport
from kv_transfer.protocol import Via
from kv_transfer.segments import OwnSegment, Segment


class ShmTransport(ArenaTransport):
    """An arena of touched pages, made when the first consumer asks for it."""

    via = Via.SHM

    def __init__(self, shape: ArenaShape) -> None:
        super().__init__(shape)
        self._segment: OwnSegment | None = None

    def address(self) -> str:
        if self._segment is None:
            self._segment = OwnSegment(self._shape.total_bytes)
            memory, token = self._segment.memory, self._segment.place.token
            self._arena = Arena(memory, self._shape, token, random.SystemRandom())
        return str(self._segment.place)

    def attach(self, address: str) -> ArenaInlet | None:
        try:
            segment = Segment.parse(address)
            memory = segment.map()
        except (OSError, ValueError):
            return None
        return ArenaInlet.over(memory, segment.token) if memory is not None else None

    def close(self) -> None:
        super().close()
        if self._segment is not None:
            self._segment.close()
            self._segment = None
