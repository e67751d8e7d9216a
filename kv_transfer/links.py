"""A consumer's link to one producer: its connections, and how payloads come over from there.

The first read greets the producer and waits for its welcome, which says where payloads can be
found; of the ways that both sides have and that this side can reach, all are named in every
read, best first. A producer that was started anew is greeted anew.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import zmq

from kv_transfer.protocol import (
    CODEC,
    Blocks,
    ConsumerMessage,
    Greet,
    ReadBlocks,
    Refusal,
    Refused,
    Release,
    Via,
    Welcome,
)
from kv_transfer.transport import Inlet, Payload, Transport


@dataclass(slots=True)
class _Greeting:
    """What one life of the producer was asked, and what it answered."""

    epoch: int
    waiting: list[ReadBlocks] = field(default_factory=list)
    inlets: dict[Via, Inlet] | None = None


class Link:
    """Up to `num_lanes` connections to one endpoint; `open_lane` makes one.

    Lanes beyond the first are for payloads: one connection is one TCP window and one core.
    """

    def __init__(
        self,
        transports: Mapping[Via, Transport],
        num_lanes: int,
        open_lane: Callable[[], "zmq.Socket[bytes]"],
    ) -> None:
        self.last_used = 0.0
        self.lanes = [open_lane()]
        self._transports = transports
        self._num_lanes = num_lanes
        self._open_lane = open_lane
        self._num_reads = 0
        self._greeting: _Greeting | None = None

    def __repr__(self) -> str:
        return f"<Link via={'+'.join(self.vias)} lanes={len(self.lanes)}>"

    @property
    def vias(self) -> tuple[Via, ...]:
        """The ways that work, best first; empty before the welcome."""
        inlets = self._greeting.inlets if self._greeting is not None else None
        return tuple(inlets or ())

    def send(self, message: ConsumerMessage, now: float) -> None:
        """Send, a read once its producer is known to be reachable."""
        self.last_used = now
        if isinstance(message, ReadBlocks):
            self._read(message)
            return
        if isinstance(message, Release) and self._greeting is not None:
            waiting = self._greeting.waiting
            waiting[:] = [read for read in waiting if read.handoff_id != message.handoff_id]
        self._put(self.lanes[0], message)

    def _read(self, read: ReadBlocks) -> None:
        greeting = self._greeting
        if greeting is None or greeting.epoch != read.epoch:
            self._forget()
            greeting = self._greeting = _Greeting(read.epoch)
            self._put(self.lanes[0], Greet(read.epoch, tuple(self._transports)))
        if greeting.inlets is None:
            greeting.waiting.append(read)
        else:
            self._put(self._next_lane(), replace(read, vias=self.vias))

    def welcome(self, message: Welcome) -> Iterable[Refused]:
        """Attach to what the producer offers; yield the end of reads that cannot come."""
        greeting = self._greeting
        if greeting is None or greeting.inlets is not None:
            return
        # One in another life will refuse the reads, and say so better than silence.
        addresses = {place.via: place.address for place in message.places}
        greeting.inlets = {}
        for via, transport in self._transports.items():
            inlet = transport.attach(addresses[via]) if via in addresses else None
            if inlet is not None:
                greeting.inlets[via] = inlet
        waiting, greeting.waiting = greeting.waiting, []
        if not greeting.inlets:
            yield from self._refuse(waiting, addresses)
            self._greeting = None
            return
        for read in waiting:
            self._read(read)

    def _refuse(
        self, reads: Iterable[ReadBlocks], addresses: Mapping[Via, str]
    ) -> Iterable[Refused]:
        ours, theirs = "+".join(self._transports), "+".join(addresses) or "none of them"
        detail = f"this side has {ours}, the producer {theirs}, and none reaches"
        for handoff_id in dict.fromkeys(read.handoff_id for read in reads):
            yield Refused(handoff_id, Refusal.TRANSPORT, detail)

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | None:
        """Return the parcel of a chunk, None if it is not where its producer says."""
        inlets = self._greeting.inlets if self._greeting is not None else None
        inlet = (inlets or {}).get(message.via)
        return inlet.open(message.parcel, message.payload_bytes, frame) if inlet else None

    def close(self) -> None:
        self._forget()
        for lane in self.lanes:
            lane.close()

    def _forget(self) -> None:
        if self._greeting is not None:
            for inlet in (self._greeting.inlets or {}).values():
                inlet.close()
            self._greeting = None

    def _next_lane(self) -> "zmq.Socket[bytes]":
        if self.vias[:1] != (Via.TCP,):
            return self.lanes[0]
        self._num_reads += 1
        index = self._num_reads % self._num_lanes
        if index >= len(self.lanes):
            self.lanes.append(self._open_lane())
            index = len(self.lanes) - 1
        return self.lanes[index]

    def _put(self, lane: "zmq.Socket[bytes]", message: ConsumerMessage) -> None:
        # A dead producer's queue is bounded by the stall time-out of its pulls.
        lane.send(CODEC.encode(message), flags=zmq.NOBLOCK)
