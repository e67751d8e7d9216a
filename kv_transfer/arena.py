"""Equal slots in one piece of memory that producer and consumers see: who may write which.

Layout: a page of header - magic, token, bytes per slot, number of slots, then the *serial* of
what is in each slot - half a page, and the slots, unless they lie in a device's memory. A serial
is never used twice and changes before a slot is written again, so a reader that finds it
unchanged after reading has read what was announced.
"""

import random
import struct
from contextlib import suppress
from dataclasses import dataclass

from kv_transfer.blocks import Memory
from kv_transfer.protocol import Blocks
from kv_transfer.transport import Payload, Stage

PAGE_BYTES = 4096
TOKEN_BYTES = 16
_MAGIC = b"tandemKV"
_HEADER = struct.Struct(f"<8s{TOKEN_BYTES}sQQ")
_SERIAL = struct.Struct("<Q")
_SERIALS_AT = 64
# Slots begin in the middle of a page, tensors near the beginning of one. Where both have about
# the same place in their pages, the processor takes each load for one of the store before it,
# and a copy runs at a third of its rate.
_SLOTS_AT = PAGE_BYTES + PAGE_BYTES // 2
MAX_SLOTS = (PAGE_BYTES - _SERIALS_AT) // _SERIAL.size


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """How an arena is cut: `num_slots` of `slot_bytes`, behind the header."""

    slot_bytes: int
    num_slots: int

    @classmethod
    def for_chunks(cls, chunk_bytes: int, arena_bytes: int) -> "ArenaShape":
        """Cut about `arena_bytes` into slots of at least `chunk_bytes`, two at the fewest."""
        slot_bytes = -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES
        return cls(slot_bytes, min(MAX_SLOTS, max(2, arena_bytes // slot_bytes)))

    @classmethod
    def found_in(cls, memory: memoryview, token: bytes) -> "ArenaShape | None":
        """Return how the arena that `token` names is cut, None if this is not its header."""
        if len(memory) < PAGE_BYTES:
            return None
        magic, found, slot_bytes, num_slots = _HEADER.unpack_from(memory)
        is_arena = (magic, found) == (_MAGIC, token) and 0 < num_slots <= MAX_SLOTS
        return cls(slot_bytes, num_slots) if is_arena else None

    @property
    def slots_bytes(self) -> int:
        return self.slot_bytes * self.num_slots

    @property
    def total_bytes(self) -> int:
        return 2 * PAGE_BYTES + self.slots_bytes

    def slot_at(self, parcel: int) -> int:
        """Return where the slot of a parcel begins among the slots."""
        return parcel % self.num_slots * self.slot_bytes


class Arena:
    """The producer's view: hands out slots, the one used last first, as it is still cached.

    They are behind the header in `memory`, if not `slots`.
    """

    def __init__(
        self,
        memory: memoryview,
        shape: ArenaShape,
        token: bytes,
        rng: random.Random,
        slots: "Memory | None" = None,
    ) -> None:
        self._header = memory[:PAGE_BYTES]
        self._slots = memory[_SLOTS_AT:] if slots is None else slots
        self._shape = shape
        self._free = list(range(shape.num_slots))
        self._staged: dict[int, Memory] = {}
        # Another arena at this address, of another life, must not have the same serials.
        self._serial = rng.getrandbits(48)
        _HEADER.pack_into(memory, 0, _MAGIC, token, shape.slot_bytes, shape.num_slots)

    def __repr__(self) -> str:
        return f"<Arena {len(self._staged)} of {self._shape.num_slots} slots in use>"

    def stage(self, num_bytes: int) -> Stage | None:
        """Return a slot to write; None while all are in use, or if none is large enough."""
        if not self._free or num_bytes > self._shape.slot_bytes:
            return None
        slot = self._free.pop()
        self._serial += 1
        parcel = self._serial * self._shape.num_slots + slot
        self._mark(slot, self._serial)
        start = self._shape.slot_at(parcel)
        buffer = self._staged[parcel] = self._slots[start : start + num_bytes]
        return Stage(parcel, buffer)

    def free(self, parcel: int) -> None:
        """Take a slot back; readers who are still in it find out."""
        buffer = self._staged.pop(parcel, None)
        if buffer is not None:
            slot = parcel % self._shape.num_slots
            self._mark(slot, 0)
            self._free.append(slot)
            _release(buffer)

    def close(self) -> None:
        """Let go of the memory; what was announced stays readable where it is mapped."""
        for buffer in self._staged.values():
            _release(buffer)
        self._staged.clear()
        self._header = self._slots = memoryview(b"")

    def _mark(self, slot: int, serial: int) -> None:
        _SERIAL.pack_into(self._header, _SERIALS_AT + slot * _SERIAL.size, serial)


def _release(buffer: Memory) -> None:
    """Make late writes an error, and see that a kept reference keeps no memory."""
    # A copy that broke in the middle may still have a view of its own.
    if isinstance(buffer, memoryview):
        with suppress(BufferError):
            buffer.release()


class ArenaTransport:
    """What transports over an arena have in common; a subclass makes it, for the first consumer
    that asks for its address at the latest."""

    def __init__(self, shape: ArenaShape) -> None:
        self._shape = shape
        self._arena: Arena | None = None

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        return num_bytes <= self._shape.slot_bytes

    def stage(self, num_bytes: int, reader: str) -> Stage | None:
        return self._arena.stage(num_bytes) if self._arena is not None else None

    def free(self, parcel: int) -> None:
        if self._arena is not None:
            self._arena.free(parcel)

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None


class ArenaInlet:
    """A consumer's view of somebody's arena; trusts nothing that is written there."""

    def __init__(self, header: memoryview, slots: Memory, shape: ArenaShape) -> None:
        self._header = header
        self._slots = slots
        self._shape = shape

    @classmethod
    def over(cls, memory: memoryview, token: bytes) -> "ArenaInlet | None":
        """Return a view if `memory` is the arena that `token` names, whole."""
        shape = ArenaShape.found_in(memory, token)
        if shape is None or shape.total_bytes != len(memory):
            return None
        return cls(memory[:PAGE_BYTES], memory[_SLOTS_AT:], shape)

    def door(self) -> str:
        return ""

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | None:
        parcel, num_bytes = message.parcel, message.payload_bytes
        if frame is not None or not 0 < num_bytes <= self._shape.slot_bytes:
            return None
        start = self._shape.slot_at(parcel)
        content = self._slots[start : start + num_bytes]
        return Payload(content, lambda: self._holds(parcel)) if self._holds(parcel) else None

    def close(self) -> None:
        # The mapping goes with its last view: one may be open in the consumer's hands.
        self._header = self._slots = memoryview(b"")

    def _holds(self, parcel: int) -> bool:
        if not self._header:
            return False
        serial, slot = divmod(parcel, self._shape.num_slots)
        (found,) = _SERIAL.unpack_from(self._header, _SERIALS_AT + slot * _SERIAL.size)
        # A free slot is marked 0, and no parcel has that serial.
        return bool(found == serial > 0)
