"""Payloads as frames behind their message on the ZeroMQ connection: no peer is out of reach.

Frames are sent from where they were gathered. ZeroMQ lets go of that memory when the kernel has
it; buffers wait here until then and are used again, because pages touched for the first time
halve the rate of any copy.
"""

from dataclasses import dataclass

import zmq

from kv_transfer.protocol import Blocks, Via
from kv_transfer.transport import Payload, Stage

# A frame that claims more is dropped before it is allocated, and its sender disconnected.
MAX_FRAME_BYTES = 1 << 30


@dataclass(slots=True)
class _Buffer:
    memory: bytearray
    # Not the frame: as long as one is kept, ZeroMQ is not done with its memory.
    tracker: zmq.MessageTracker


class TcpTransport:
    """Up to `max_kept` buffers, the one used last first; more are made and dropped on demand.

    Nothing waits for room: a consumer that stopped reading would make all others wait.
    """

    via = Via.TCP

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        self._buffers: list[_Buffer] = []

    def address(self) -> str:
        return ""

    def attach(self, address: str) -> "FrameInlet":
        return FrameInlet()

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        return num_bytes <= MAX_FRAME_BYTES

    def stage(self, num_bytes: int, reader: str) -> Stage:
        memory = self._take_unsent(num_bytes) or bytearray(num_bytes)
        buffer = memoryview(memory)[:num_bytes]
        # Not copied, however small: the blocks are gathered after this.
        frame = zmq.Frame(buffer, track=True, copy=False, copy_threshold=0)
        if len(self._buffers) < self._max_kept:
            self._buffers.append(_Buffer(memory, frame.tracker))
        return Stage(0, buffer, frame)

    def free(self, parcel: int) -> None:
        """Nothing to do: ZeroMQ says when it is done with a frame."""

    def close(self) -> None:
        self._buffers.clear()

    def _take_unsent(self, num_bytes: int) -> bytearray | None:
        """Take a buffer that is large enough and no longer being sent out of the row."""
        for index in reversed(range(len(self._buffers))):
            buffer = self._buffers[index]
            if len(buffer.memory) >= num_bytes and buffer.tracker.done:
                return self._buffers.pop(index).memory
        return None


class FrameInlet:
    """Payloads come with their messages; a frame that was received is nobody else's."""

    def door(self) -> str:
        return ""

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | None:
        return None if frame is None else Payload(frame)

    def close(self) -> None:
        """Nothing is held between messages."""
