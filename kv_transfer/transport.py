"""How payloads get from a producer's memory into a consumer's: one interface, one way each.

A producer *stages* a chunk: it gathers blocks into memory the transport gave it, looks once
more whether the blocks are still its own, and only then announces the chunk in a message that
names the *parcel*. A consumer has *attached* to the producer's place and opens the parcel there.
The parcel belongs to the consumer until it says that it has taken it, or the hand-off ends.

The calls do not block, and each is about one chunk. Where payloads do not lie in memory that both
see, a chunk is sent when it is announced and `open` returns what will come, or why it did not.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kv_transfer.blocks import Content, Memory
from kv_transfer.protocol import Blocks, Via

if TYPE_CHECKING:
    import zmq


@dataclass(frozen=True, slots=True)
class Stage:
    """Memory to gather one chunk into, none if it is read in place; `frame` is set if the message
    carries it along, `send` is called when it is announced."""

    parcel: int
    buffer: Memory
    frame: "zmq.Frame | None" = None
    send: Callable[[], None] = lambda: None


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Payload:
    """One chunk where the consumer can read it.

    `is_intact` is asked after reading: a producer that has given the consumer up may have put
    something else there meanwhile.
    """

    content: Content
    is_intact: Callable[[], bool] = _always


class Inlet(Protocol):
    """A consumer's end: one producer's place, attached."""

    def door(self) -> str | None:
        """Return what the next read says of where we are found; None if this way is broken."""
        ...

    def open(self, message: Blocks, frame: memoryview | None) -> "Payload | Future[Payload] | None":
        """Return an announced chunk, or one that is being received; None if it is not there,
        whatever a peer may have said. The future is done in any thread, an error says why."""
        ...

    def close(self) -> None:
        """Let go of the producer's memory."""
        ...


class Transport(Protocol):
    """One way of carrying payloads, for every peer of one port; called from its thread only."""

    via: Via

    def address(self) -> str:
        """Return what consumers need in order to attach; memory is taken at the first call."""
        ...

    def attach(self, address: str) -> Inlet | None:
        """Return the way into a producer's place, None if it cannot be reached from here."""
        ...

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        """Return whether such a chunk can go this way to whom an inlet's `door` named."""
        ...

    def stage(self, num_bytes: int, reader: str) -> Stage | None:
        """Return memory for a chunk, None while there is no room."""
        ...

    def free(self, parcel: int) -> None:
        """The parcel was taken or is given up: its memory may be used again."""
        ...

    def close(self) -> None:
        """Give all memory back."""
        ...
