"""Sockets of the request and token plane: a ROUTER per worker, a DEALER per router and worker.

Both ends share the rule that every message is one frame and a multipart carries several. A
frame that is not a valid message is dropped and counted; it never reaches a request.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq

from cluster.errors import ConnectionCut, HandoffFailed, TandemError, WorkerLost
from cluster.messages import (
    CODEC,
    Cancel,
    Decode,
    Failed,
    Heartbeat,
    Offered,
    Prefill,
    Prefilled,
    Rejected,
    RouterMessage,
    Tally,
    Tokens,
    WorkerMessage,
    WorkerSnapshot,
)
from cluster.metrics import BROKEN_LINKS, MALFORMED_FRAMES
from cluster.names import RequestId, RouterId, WorkerId
from cluster.seldom import Seldom
from cluster.sockets import Sockets
from cluster.tallies import TallyReader, Traffic
from cluster.wire import MAX_FRAME_BYTES, WireError

# Often enough that a snapshot shows within a second what a cancelled request has freed.
HEARTBEAT_S = 0.25
# Of a router's message, and taken before it is known who sends it: a million token ids are 5 MiB.
MAX_REQUEST_BYTES = 8 << 20
_MAX_FRAMES = 4096
_LAST_WORDS_MS = 500
# Kept per link until a tally says that they have come.
_MAX_CANCELS = 4096

logger = logging.getLogger(__name__)
# All of them are counted; a peer that sends nothing else must not fill the disk.
_warnings = Seldom(10.0)


def _decode_all(frames: Sequence[bytes], plane: str) -> list[object]:
    messages: list[object] = []
    for frame in frames[:_MAX_FRAMES]:
        try:
            messages.append(CODEC.decode(frame))
        except WireError as error:
            MALFORMED_FRAMES.labels(plane).inc()
            if _warnings.is_due():
                logger.warning("dropped a malformed frame on the %s plane: %s", plane, error)
    return messages


class WorkerSocket:
    """The worker's end: one bound ROUTER; peers are named by their ZeroMQ identity."""

    def __init__(self, sockets: Sockets, host: str) -> None:
        self._socket = sockets.open(zmq.ROUTER, MAX_REQUEST_BYTES)
        # A router that restarts under its old identity must take its connection over.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = sockets.listen(self._socket, host)
        self._traffic: dict[bytes, Traffic] = {}
        # Shown as 0 from the start: the first one is to be seen as an increase.
        MALFORMED_FRAMES.labels("request")

    async def receive(self) -> AsyncIterator[tuple[bytes, RouterMessage]]:
        """Yield (peer, message) until the socket is closed. Of each peer something is kept until
        the caller has it forgotten."""
        while not self._socket.closed:
            peer, *frames = await self._socket.recv_multipart()
            for message in _decode_all(frames, "request"):
                if isinstance(message, RouterMessage):
                    await self._tally(peer, message)
                    yield peer, message

    async def _tally(self, peer: bytes, message: RouterMessage) -> None:
        traffic = self._traffic.setdefault(peer, Traffic())
        if isinstance(message, Heartbeat):
            tally = Tally(message.num_asked, traffic.num_received, traffic.num_sent)
            await self._socket.send_multipart([peer, CODEC.encode(tally)])
        else:
            traffic.num_received += 1

    def forget(self, peer: bytes) -> None:
        """Count afresh if the peer comes again: to its link that is a loss."""
        self._traffic.pop(peer, None)

    async def send(self, peer: bytes, messages: Sequence[WorkerMessage]) -> None:
        """Send to `peer`; a peer that is gone is dropped by ZeroMQ, its silence noticed."""
        frames = [CODEC.encode(message) for message in messages]
        if (traffic := self._traffic.get(peer)) is not None:
            traffic.num_sent += sum(not isinstance(each, WorkerSnapshot) for each in messages)
        await self._socket.send_multipart([peer, *frames])

    async def reaches(self, peer: bytes, snapshot: WorkerSnapshot) -> bool:
        """Send the snapshot; return whether `peer` has a connection. That of a process that has
        ended is closed; where a host or network is gone, it may look open for long."""
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            # Tried before the call returns; only its outcome is awaited.
            sending = self._socket.send_multipart([peer, CODEC.encode(snapshot)], zmq.NOBLOCK)
        finally:
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        try:
            await sending
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True

    def close(self) -> None:
        """Stop listening; what was sent last still goes out."""
        self._socket.close(linger=_LAST_WORDS_MS)


class Leg:
    """One request's conversation with one worker; closing it early cancels it there.

    `number` is that of its first message among those of the link.
    """

    def __init__(self, link: "WorkerLink", request_id: RequestId, number: int) -> None:
        self._link = link
        self.request_id = request_id
        self.number = number
        self.is_lost = False
        self._inbox: asyncio.Queue[WorkerMessage | TandemError] = asyncio.Queue()
        self._consumer: Leg | None = None
        self._has_tokens = False
        self._is_done = False

    def deliver(self, message: WorkerMessage | TandemError) -> None:
        self._has_tokens = self._has_tokens or isinstance(message, Tokens)
        self._inbox.put_nowait(message)
        if self._consumer is not None:
            self._consumer.lose_producer(self._link.worker_id)

    def tie(self, consumer: "Leg") -> None:
        """Tell `consumer`, which pulls the blocks held here, if this worker gives them up.

        After `Prefilled` a worker has nothing more to say, so whatever else is delivered here
        means that the blocks are gone.
        """
        self._consumer = consumer
        if not self._inbox.empty():
            consumer.lose_producer(self._link.worker_id)

    def lose_producer(self, producer: WorkerId) -> None:
        """Fail the hand-off unless tokens prove that the blocks have arrived."""
        if not self._has_tokens:
            self.deliver(HandoffFailed(f"prefill worker {producer} gave up the blocks it held"))

    async def receive(self) -> WorkerMessage:
        """Return the next message; raise `WorkerLost` if the worker is gone."""
        message = await self._inbox.get()
        if isinstance(message, TandemError):
            # The worker may be alive and only have been silent, so closing still cancels.
            raise message
        if isinstance(message, Rejected | Failed):
            self._is_done = True
        if isinstance(message, Tokens) and message.finish_reason is not None:
            self._is_done = True
        return message

    def lose(self, error: WorkerLost) -> None:
        """Have `receive` raise `error` after what has arrived."""
        self.is_lost = True
        self.deliver(error)

    def fail(self, error: TandemError) -> None:
        """Close the leg from this side; `receive` raises `error` whatever has arrived."""
        self.close()
        while not self._inbox.empty():
            self._inbox.get_nowait()
        self._inbox.put_nowait(error)

    def close(self) -> None:
        """Forget the leg; tell the worker to end it and free its blocks unless it has ended.

        A prefill leg never ends by itself: its blocks stay held until pulled, so closing one
        whose blocks were pulled is a cancel the worker ignores.
        """
        self._link.forget(self.request_id)
        if not self._is_done:
            self._is_done = True
            self._link.send(Cancel(self.request_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class WorkerLink:
    """The router's end of one worker: legs by request, heartbeats, and the loss of the worker
    or of messages.

    `snapshot` is the worker's latest answer to a heartbeat, `snapshot_s` when it came (loop
    time). After `timeout_s` without any message the link is lost: every open leg raises
    `WorkerLost`, and so does every new one, until the worker answers again. Where tallies tell
    that messages were lost on a connection that ZeroMQ has repaired, the open legs raise it, too,
    and new ones may be opened. `on_change` is called when the link is lost, and when a snapshot
    shows another worker, role or life than the one before, `on_room` when it shows more free KV
    blocks.
    """

    def __init__(
        self,
        sockets: Sockets,
        router_id: RouterId,
        worker_id: WorkerId,
        endpoint: str,
        timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        MALFORMED_FRAMES.labels("token")
        self.worker_id = worker_id
        self.endpoint = endpoint
        self.snapshot: WorkerSnapshot | None = None
        self.snapshot_s = 0.0
        self.is_lost = False
        self._router_id = router_id
        self._timeout_s = timeout_s
        # Short time-outs need more than one heartbeat in them too.
        self._heartbeat_s = min(HEARTBEAT_S, timeout_s / 3)
        self._on_change = on_change
        self._on_room = on_room
        self._heard_s = asyncio.get_running_loop().time()
        self._legs: dict[RequestId, Leg] = {}
        self._traffic = Traffic()
        self._tallies = TallyReader()
        self._num_unanswered = 0
        # With their numbers. Their legs are forgotten here: after a loss they are said again.
        self._cancels: deque[tuple[int, Cancel]] = deque(maxlen=_MAX_CANCELS)
        self._sockets = sockets
        # Which key it was made under; links under two keys are two peers to the worker.
        self.key = sockets.key
        self._socket = self._connect()
        self._receiving = asyncio.create_task(self._receive_all())
        self._tasks = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._watch())]

    def _connect(self) -> Any:
        socket = self._sockets.open(zmq.DEALER, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.IDENTITY, f"{self._router_id}{self.key}".encode())
        self._sockets.connect(socket, self.endpoint)
        return socket

    def _connect_again(self) -> None:
        """ZeroMQ repairs connections that break, but not those on which something came that was
        no frame, or not from its peer: after them a socket stays silent."""
        self._receiving.cancel()
        self._socket.close()
        self._socket = self._connect()
        self._receiving = asyncio.create_task(self._receive_all())

    def __repr__(self) -> str:
        state = "lost" if self.is_lost else "up"
        return f"<WorkerLink {self.worker_id} {state} legs={len(self._legs)}>"

    def renewed(self) -> "WorkerLink":
        """Return another link to the same worker, under the key in use by now."""
        return WorkerLink(
            self._sockets,
            self._router_id,
            self.worker_id,
            self.endpoint,
            self._timeout_s,
            self._on_change,
            self._on_room,
        )

    @property
    def num_legs(self) -> int:
        return len(self._legs)

    def open(self, message: Prefill | Decode) -> Leg:
        """Send `message` and return its leg; raise `WorkerLost` if the worker is lost."""
        if self.is_lost:
            raise WorkerLost(f"worker {self.worker_id} is lost")
        if message.request_id in self._legs:
            raise ValueError(f"request {message.request_id} already has a leg on {self!r}")
        self.send(message)
        leg = self._legs[message.request_id] = Leg(self, message.request_id, self._traffic.num_sent)
        return leg

    def send(self, message: RouterMessage) -> None:
        if self._socket.closed:
            return
        frame = CODEC.encode(message)
        if isinstance(message, Heartbeat):
            self._num_unanswered += 1
        else:
            self._traffic.num_sent += 1
        if isinstance(message, Cancel):
            self._cancels.append((self._traffic.num_sent, message))
        self._socket.send_multipart([frame])

    def beat(self) -> None:
        """Send a heartbeat."""
        self.send(Heartbeat(self._router_id, self._traffic.num_sent))

    def forget(self, request_id: RequestId) -> None:
        self._legs.pop(request_id, None)

    def lose(self, reason: str) -> None:
        """Give the worker up: its open legs raise `WorkerLost(reason)`."""
        if self.is_lost:
            return
        self.is_lost = True
        for leg in list(self._legs.values()):
            leg.lose(WorkerLost(f"worker {self.worker_id}: {reason}"))
        self._on_change()

    async def _receive_all(self) -> None:
        # No timeout around this await: cancelling a receive that has just completed would lose
        # the message.
        while True:
            frames = await self._socket.recv_multipart()
            for message in _decode_all(frames, "token"):
                self._heard_s = asyncio.get_running_loop().time()
                self._dispatch(message)

    def _dispatch(self, message: object) -> None:
        if isinstance(message, WorkerSnapshot):
            self._update(message)
        elif isinstance(message, Tally):
            self._compare(message)
        elif isinstance(message, Rejected | Offered | Prefilled | Tokens | Failed):
            self._traffic.num_received += 1
            leg = self._legs.get(message.request_id)
            if leg is not None:
                leg.deliver(message)

    def _compare(self, tally: Tally) -> None:
        """End the legs that may have lost something since the last tally, if anything was lost."""
        if not self._num_unanswered:
            return
        self._num_unanswered -= 1
        suspects = self._tallies.read(tally, self._traffic.num_received)
        if suspects is None:
            while self._cancels and self._cancels[0][0] <= tally.num_asked:
                self._cancels.popleft()
            return
        cancels = list(self._cancels)
        self._cancels.clear()
        for _, cancel in cancels:
            self.send(cancel)
        legs = [leg for leg in self._legs.values() if leg.number in suspects and not leg.is_lost]
        if not legs:
            return
        BROKEN_LINKS.inc()
        if _warnings.is_due():
            logger.warning("%r: messages were lost on the way: %d legs end", self, len(legs))
        for leg in legs:
            leg.lose(ConnectionCut(f"worker {self.worker_id}: messages were lost on the way"))

    def _update(self, snapshot: WorkerSnapshot) -> None:
        is_changed = self.is_lost or _life(self.snapshot) != _life(snapshot)
        known, self.snapshot = self.snapshot, snapshot
        self.snapshot_s = self._heard_s
        self.is_lost = False
        if is_changed:
            self._on_change()
        elif known is not None and snapshot.num_free_blocks > known.num_free_blocks:
            self._on_room()

    async def _heartbeat(self) -> None:
        while True:
            self.beat()
            await asyncio.sleep(self._heartbeat_s)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wake_s = self._heard_s + self._timeout_s
            if self.is_lost:
                wake_s = loop.time() + self._timeout_s
            await asyncio.sleep(wake_s - loop.time())
            if self.is_lost:
                self._connect_again()
            elif loop.time() > wake_s + self._heartbeat_s:
                # This loop was held up itself, so the silence says nothing of the worker.
                self._heard_s = loop.time()
            elif loop.time() >= self._heard_s + self._timeout_s:
                self.lose(f"silent for {self._timeout_s:.1f} s")

    async def close(self) -> None:
        """End the link; open legs raise `WorkerLost`."""
        tasks = [*self._tasks, self._receiving]
        for task in tasks:
            task.cancel()
        self.lose("link closed")
        self._socket.close()
        await asyncio.gather(*tasks, return_exceptions=True)


def _life(snapshot: WorkerSnapshot | None) -> tuple[str, str, int] | None:
    return (snapshot.worker_id, snapshot.role, snapshot.epoch) if snapshot else None
