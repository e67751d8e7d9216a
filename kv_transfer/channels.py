"""Payloads sent from one device's memory into another's, over a channel that two ports share.

A reader invites with each of its reads; the producer joins when it has the first chunk for it, and
sends chunks in the order in which it announces them. The reader receives in that order, as it
hears of them, and looks whether what came is what was announced. Each end of a channel has a
thread, for calls that block: they end by a time-out or when the channel is aborted, and with the
first that fails the channel is broken. Its reader goes other ways then, or invites anew.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

from kv_transfer.arena import ArenaShape
from kv_transfer.protocol import Blocks, Via
from kv_transfer.transport import Payload, Stage

_MAX_READERS = 64
_CLOSE_S = 2.0
# In front of each payload: its parcel, and what keeps the payload aligned.
_HEADER_BYTES = 16
_PARCEL_BYTES = 8

logger = logging.getLogger(__name__)


class ChannelBroken(Exception):
    """Nothing more goes over a channel, and why."""


# What backends raise where none can meet.
_NO_INVITATION = (OSError, RuntimeError, ChannelBroken)


class Channel(Protocol):
    """One end, joined. Whatever a call raises ends the channel."""

    def send(self, memory: torch.Tensor) -> None:
        """Return when `memory` may be used again."""
        ...

    def receive(self, memory: torch.Tensor) -> None:
        """Return when `memory` is filled."""
        ...

    def abort(self) -> None:
        """End calls in progress with an error, and give everything back; from any thread."""
        ...


class Invitation(Protocol):
    """A reader's end before anybody has joined; `address` is for one producer."""

    address: str

    def accept(self) -> Channel:
        """Wait for the producer to join, up to a time-out."""
        ...


class Backend(Protocol):
    """What moves bytes between two processes' memory of one kind."""

    via: Via
    device: torch.device

    def invite(self) -> Invitation: ...

    def join(self, address: str) -> Channel:
        """Join whom an invitation's address names, up to a time-out; it comes from the wire."""
        ...

    def ordered(self) -> AbstractContextManager[object]:
        """Return what a channel's thread does its work in."""
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    run: Callable[[Channel], None]
    fail: Callable[[str], None]


@dataclass(slots=True)
class _Slot:
    """Users are whoever staged it, and the send."""

    memory: torch.Tensor
    num_users: int = 1


class End:
    """One end of a channel and its thread, which makes the channel when there is a first job.

    Every job is run or failed, once. `over_because` says why none is run any more.
    """

    def __init__(
        self, backend: Backend, connect: Callable[[], Channel], idle_s: float | None
    ) -> None:
        self.over_because: str | None = None
        self._backend = backend
        self._connect = connect
        self._idle_s = idle_s
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._thread = threading.Thread(target=self._work, name="kv-channel", daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        with self._lock:
            if self.over_because is None:
                self._jobs.put(job)
                return
        job.fail(self.over_because)

    def close(self) -> None:
        """Fail whatever is not done yet, soon; does not wait for it."""
        self._end("closed")
        self._jobs.put(None)

    def has_ended(self, timeout_s: float) -> bool:
        """Wait for the thread; return whether it is gone."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _end(self, reason: str) -> None:
        with self._lock:
            if self.over_because is not None:
                return
            self.over_because = f"{self._backend.via.value}: {reason}"
            channel = self._channel
        if channel is not None:
            channel.abort()

    def _work(self) -> None:
        with self._backend.ordered():
            while self.over_because is None:
                self._do_next()
        # Whoever puts one from here on sees that it is over.
        while not self._jobs.empty():
            if (job := self._jobs.get()) is not None:
                job.fail(str(self.over_because))
        # What they listen on and keep open goes with them.
        self._channel = None
        del self._connect

    def _do_next(self) -> None:
        try:
            job = self._jobs.get(timeout=self._idle_s)
        except Empty:
            self._end("not used for a while")
            return
        if job is None:
            return
        try:
            job.run(self._joined())
        # What a backend raises is its own affair; the channel is of no use after it.
        except Exception as error:
            self._end(str(error) or type(error).__name__)
            job.fail(str(self.over_because))

    def _joined(self) -> Channel:
        if self._channel is None:
            channel = self._connect()
            with self._lock:
                self._channel = channel
                is_over = self.over_because is not None
            if is_over:
                channel.abort()
        assert self._channel is not None
        return self._channel


class ChannelTransport:
    """Slots of the backend's memory, taken as they are needed, and a channel per reader.

    Its reader does not go on with a channel after `idle_s` without use; the producer's end, which
    hears of no reader's death when there is nothing to send, is given up after twice that.
    """

    def __init__(self, backend: Backend, shape: ArenaShape, idle_s: float = 60.0) -> None:
        self.via = backend.via
        self._backend = backend
        self._shape = shape
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        self._num_slots = 0
        self._in_use: dict[int, _Slot] = {}
        # Another life's parcels must not look like ours.
        self._serial = secrets.randbits(48)
        self._senders: dict[str, End] = {}
        self._ends: list[End] = []

    def address(self) -> str:
        return ""

    def attach(self, address: str) -> "ChannelInlet | None":
        try:
            return ChannelInlet(self._backend, self._shape.slot_bytes, self._idle_s, self._follow)
        except _NO_INVITATION:
            logger.exception("no channel over %s can be offered", self.via.value)
            return None

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        if num_bytes > self._shape.slot_bytes or not reader:
            return False
        if reader in self._senders:
            return self._senders[reader].over_because is None
        num_live = sum(sender.over_because is None for sender in self._senders.values())
        return num_live < _MAX_READERS

    def stage(self, num_bytes: int, reader: str) -> Stage | None:
        memory = self._take_slot()
        if memory is None:
            return None
        self._serial += 1
        parcel = self._serial
        self._in_use[parcel] = _Slot(memory)
        payload = memory[_HEADER_BYTES : _HEADER_BYTES + num_bytes]
        return Stage(parcel, payload, send=lambda: self._send(parcel, num_bytes, reader))

    def free(self, parcel: int) -> None:
        self._let_go(parcel)

    def close(self) -> None:
        for end in self._ends:
            end.close()
        deadline = time.monotonic() + _CLOSE_S
        for end in self._ends:
            if not end.has_ended(max(0.0, deadline - time.monotonic())):
                logger.error("a channel over %s does not end: its thread is left", self.via.value)
        self._senders.clear()
        self._ends.clear()
        self._free.clear()
        self._in_use.clear()

    def _send(self, parcel: int, num_bytes: int, reader: str) -> None:
        slot = self._in_use[parcel]
        slot.num_users += 1
        message = slot.memory[: _HEADER_BYTES + num_bytes]

        def send(channel: Channel) -> None:
            _parcel_in(message).fill_(parcel)
            channel.send(message)
            self._let_go(parcel)

        self._sender(reader).put(_Job(send, lambda _: self._let_go(parcel)))

    def _sender(self, reader: str) -> End:
        sender = self._senders.get(reader)
        if sender is None:
            if len(self._senders) >= _MAX_READERS:
                over = [name for name, end in self._senders.items() if end.over_because]
                for name in over:
                    del self._senders[name]
            sender = End(self._backend, lambda: self._backend.join(reader), 2 * self._idle_s)
            self._senders[reader] = sender
            self._follow(sender)
        return sender

    def _follow(self, end: End) -> None:
        """Keep an end to wait for, and forget those that need no waiting for."""
        self._ends = [other for other in self._ends if not other.has_ended(0)]
        self._ends.append(end)

    def _take_slot(self) -> torch.Tensor | None:
        with self._lock:
            if self._free:
                return self._free.pop()
        if self._num_slots == self._shape.num_slots:
            return None
        try:
            memory = _memory(self._shape.slot_bytes, self._backend.device)
        except torch.OutOfMemoryError:
            # As good as none: the next way, or later.
            return None
        self._num_slots += 1
        return memory

    def _let_go(self, parcel: int) -> None:
        """One of a slot's users is done: its consumer has it, or it is sent. From any thread."""
        with self._lock:
            slot = self._in_use.get(parcel)
            if slot is None:
                return
            slot.num_users -= 1
            if slot.num_users == 0:
                del self._in_use[parcel]
                self._free.append(slot.memory)


class ChannelInlet:
    """A reader's end of one producer's channel; `follow` is told of each that is made."""

    def __init__(
        self,
        backend: Backend,
        max_bytes: int,
        idle_s: float,
        follow: Callable[[End], None],
    ) -> None:
        self._backend = backend
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._follow = follow
        self._used = time.monotonic()
        self._invite()

    def door(self) -> str | None:
        now = time.monotonic()
        if self._end.over_because is None and now - self._used >= self._idle_s:
            # The producer may have given its end up, or will while it answers this read.
            self._end.close()
            try:
                self._invite()
            except _NO_INVITATION:
                logger.exception("no channel over %s can be offered", self._backend.via.value)
        self._used = now
        return self._address if self._end.over_because is None else None

    def open(self, message: Blocks, frame: memoryview | None) -> Future[Payload] | None:
        parcel, num_bytes = message.parcel, message.payload_bytes
        if frame is not None or not 0 < num_bytes <= self._max_bytes:
            return None
        self._used = time.monotonic()
        payload: Future[Payload] = Future()

        def receive(channel: Channel) -> None:
            memory = _memory(num_bytes, self._backend.device)
            channel.receive(memory)
            found = int(_parcel_in(memory))
            if found != parcel:
                raise ChannelBroken(f"parcel {found} came where {parcel} was announced")
            payload.set_result(Payload(memory[_HEADER_BYTES:]))

        fail = lambda reason: payload.set_exception(ChannelBroken(reason))  # noqa: E731
        self._end.put(_Job(receive, fail))
        return payload

    def close(self) -> None:
        self._end.close()

    def _invite(self) -> None:
        invitation = self._backend.invite()
        self._address = invitation.address
        self._end = End(self._backend, invitation.accept, None)
        self._follow(self._end)


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return memory for a payload of `num_bytes` and its header."""
    return torch.empty(_HEADER_BYTES + num_bytes, dtype=torch.uint8, device=device)


def _parcel_in(message: torch.Tensor) -> torch.Tensor:
    """Return where a message says which parcel it is, as one integer."""
    return message[:_PARCEL_BYTES].view(torch.int64)
