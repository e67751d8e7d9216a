"""Payloads between two ports of one process, for tests: an arena in plain memory."""

import random
import secrets

from kv_transfer.arena import TOKEN_BYTES, Arena, ArenaInlet, ArenaShape, ArenaTransport
from kv_transfer.protocol import Via

# What stands for the host: ports that are given the same one can reach each other.
Places = dict[str, memoryview]


class InprocTransport(ArenaTransport):
    """An arena that ports with the same `places` find by its token."""

    via = Via.INPROC

    def __init__(self, shape: ArenaShape, places: Places) -> None:
        super().__init__(shape)
        self._places = places
        self._token = secrets.token_bytes(TOKEN_BYTES)
        memory = memoryview(bytearray(shape.total_bytes))
        self._arena = Arena(memory, shape, self._token, random.SystemRandom())
        places[self._token.hex()] = memory

    def address(self) -> str:
        return self._token.hex()

    def attach(self, address: str) -> ArenaInlet | None:
        memory = self._places.get(address)
        return ArenaInlet.over(memory, bytes.fromhex(address)) if memory is not None else None

    def close(self) -> None:
        self._places.pop(self._token.hex(), None)
        super().close()
