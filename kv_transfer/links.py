"""A consumer's link to one producer: its connections, and how payloads come over from there.

The first read greets the producer and waits for its welcome, which says where payloads can be
found; of the ways that both sides have and that this side can reach, all are named in every
read, best first. A producer that was started anew at the same endpoint has another epoch and
with it another link.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace

import zmq

from kv_transfer.protocol import (
    CODEC,
    Blocks,
    ConsumerMessage,
    Greet,
    Place,
    ReadBlocks,
    Refusal,
    Refused,
    Release,
    Via,
    Welcome,
)
from kv_transfer.transport import Inlet, Payload, Transport

# A producer that dies while nothing is pulled from it says nothing. Its memory stays mapped, and
# its address is tried ten times a second, until it is missed.
_GREET_S = 3.0
_IDLE_S = 60.0


class Link:
    """Up to `num_lanes` connections to one life of one endpoint; `open_lane` makes one.

    Lanes beyond the first are for payloads: one connection is one TCP window and one core.
    """

    def __init__(
        self,
        epoch: int,
        transports: Mapping[Via, Transport],
        num_lanes: int,
        open_lane: Callable[[], "zmq.Socket[bytes]"],
    ) -> None:
        self.last_used = self.last_heard = 0.0
        self.lanes = [open_lane()]
        self._greeted_s = self._welcomed_s = 0.0
        self._epoch = epoch
        self._transports = transports
        self._num_lanes = num_lanes
        self._open_lane = open_lane
        self._num_reads = 0
        self._is_greeted = False
        self._waiting: list[ReadBlocks] = []
        self._inlets: dict[Via, Inlet] = {}

    def __repr__(self) -> str:
        return f"<Link via={'+'.join(self._inlets)} lanes={len(self.lanes)}>"

    def send(self, message: ConsumerMessage, now: float) -> None:
        """Send, a read once its producer is known to be reachable."""
        self.last_used = now
        if isinstance(message, ReadBlocks):
            self._read(message)
            return
        if isinstance(message, Release):
            name = message.handoff_id
            self._waiting = [read for read in self._waiting if read.handoff_id != name]
        self._put(self.lanes[0], message)

    def _read(self, read: ReadBlocks) -> None:
        doors = {via: inlet.door() for via, inlet in self._inlets.items()}
        ways = tuple(Place(via, door) for via, door in doors.items() if door is not None)
        if ways:
            self._put(self._next_lane(ways[0].via), replace(read, ways=ways))
            return
        self._detach()
        self._waiting.append(read)
        # With each read until there is an answer: a connection that breaks in between loses it.
        self._greet()

    def check(self, now: float) -> bool:
        """Greet a producer that nobody has had to do with lately: it may be gone. Return whether
        there is still a connection to do so."""
        if not self._is_waiting and now - self._seen_s >= _GREET_S:
            self._greeted_s = now
            try:
                self._greet()
            except zmq.Again:
                return False
        return True

    def is_idle(self, now: float) -> bool:
        """Whether neither side has said anything for long."""
        return now - max(self.last_used, self.last_heard) > _IDLE_S

    @property
    def is_welcome(self) -> bool:
        """Whether the producer has answered over this link."""
        return self._welcomed_s > 0.0

    def is_dead(self, now: float, timeout_s: float) -> bool:
        """Whether nobody has answered that in time."""
        return self._is_waiting and now - self._greeted_s >= timeout_s

    @property
    def _is_waiting(self) -> bool:
        """A pull that has begun since then knows itself when to give up."""
        return self._greeted_s > self._seen_s

    @property
    def _seen_s(self) -> float:
        return max(self.last_used, self.last_heard, self._welcomed_s)

    def greet_once(self, now: float) -> None:
        """Ask a producer that has not been asked yet whether it answers over this link."""
        if not self._is_greeted:
            self.last_used = now
            self._greet()

    def _greet(self) -> None:
        self._is_greeted = True
        self._put(self.lanes[0], Greet(self._epoch, tuple(self._transports)))

    def welcome(self, message: Welcome, now: float) -> Iterable[Refused]:
        """Attach to what the producer offers; yield the end of reads that cannot come."""
        self._welcomed_s = now
        if not self._is_greeted or self._inlets:
            return
        # One in another life will refuse the reads, and say so better than silence.
        addresses = {place.via: place.address for place in message.places}
        for via, transport in self._transports.items():
            inlet = transport.attach(addresses[via]) if via in addresses else None
            if inlet is not None:
                self._inlets[via] = inlet
        waiting, self._waiting = self._waiting, []
        if self._inlets:
            for read in waiting:
                self._read(read)
        else:
            self._is_greeted = False
            yield from self._refuse(waiting, addresses)

    def _refuse(
        self, reads: Iterable[ReadBlocks], addresses: Mapping[Via, str]
    ) -> Iterable[Refused]:
        ours, theirs = "+".join(self._transports), "+".join(addresses) or "none of them"
        detail = f"this side has {ours}, the producer {theirs}, and none reaches"
        for handoff_id in dict.fromkeys(read.handoff_id for read in reads):
            yield Refused(handoff_id, Refusal.TRANSPORT, detail)

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | Future[Payload] | None:
        """Return the parcel of a chunk, None if it is not where its producer says."""
        inlet = self._inlets.get(message.via)
        return inlet.open(message, frame) if inlet else None

    def close(self) -> None:
        self._detach()
        for lane in self.lanes:
            lane.close()

    def _detach(self) -> None:
        for inlet in self._inlets.values():
            inlet.close()
        self._inlets.clear()

    def _next_lane(self, via: Via) -> "zmq.Socket[bytes]":
        if via is not Via.TCP:
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
