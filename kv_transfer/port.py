"""One engine's KV-plane port: a thread that serves its holds and makes its pulls.

The engine's thread gives commands and polls results; sockets, leases and block copies belong
to the port's thread, so no lock is shared with the engine step.
"""

import functools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import zmq

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId
from cluster.ring_file import KeySource
from cluster.sockets import Sockets
from cluster.wire import WireError
from kv_transfer import faults
from kv_transfer.blocks import BlockStore
from kv_transfer.consumer import Consumer, Order, Pull
from kv_transfer.handoff import ProducerEvent
from kv_transfer.links import Link
from kv_transfer.parcels import Parcels
from kv_transfer.producer import Answer, Hold, Producer
from kv_transfer.progress import Growth
from kv_transfer.protocol import (
    CODEC,
    Blocks,
    Filling,
    Greet,
    ReadBlocks,
    Refusal,
    Refused,
    Release,
    Renew,
    Via,
    Welcome,
)
from kv_transfer.tcp import MAX_FRAME_BYTES
from kv_transfer.transport import Payload, Transport
from kv_transfer.transports import arena_shape, transports_of

_TICK_MS = 100
_CLOSE_S = 5.0
# Whatever is larger is dropped before it is allocated, and its sender disconnected.
_MAX_REQUEST_BYTES = 64 << 10

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")
# An endpoint, the epoch of whoever is expected there, and the key that we connect with.
Peer = tuple[str, int, str]


class HandoffPort:
    """Producer and consumer of one engine behind one thread and one listening address."""

    def __init__(
        self,
        store: BlockStore,
        section: HandoffSection,
        epoch: int,
        rank: int = 0,
        step_tokens: int | None = None,
        transports: Mapping[Via, Transport] | None = None,
        keys: KeySource | None = None,
    ) -> None:
        self._layout = store.layout
        self._context = zmq.Context(io_threads=section.tcp_connections)
        self._sockets = Sockets(self._context, keys)
        self._listener = self._sockets.open(zmq.ROUTER, _MAX_REQUEST_BYTES)
        self.endpoint = self._sockets.listen(self._listener, section.bind_host)
        self._transports = transports or transports_of(section, arena_shape(section, store), store)
        parcels = Parcels(self._transports, section.stall_timeout_s)
        self.producer = Producer(
            store, epoch, section.lease_s, section.checksum, self._run_commands, parcels
        )
        self.consumer = Consumer(
            store,
            rank,
            section.chunk_bytes,
            section.reads_in_flight,
            section.stall_timeout_s,
            section.lease_s / 3,
            section.checksum,
            faults.damage_of(section.fault, store.layout),
            step_tokens,
        )
        self.counts: Counter[str] = Counter()
        self._commands: deque[Callable[[], None]] = deque()
        self._freed: deque[str] = deque()
        self._pulls: deque[EndedPull] = deque()
        self._has_news = threading.Event()
        self._links: dict[Peer, Link] = {}
        self._lanes: dict[zmq.Socket[bytes], Peer] = {}
        self._num_lanes = section.tcp_connections
        self._stall_timeout_s = section.stall_timeout_s
        self._ticked_s = time.monotonic()
        self._poller = zmq.Poller()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._listener, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="handoff-port", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<HandoffPort {self.endpoint} {self.producer!r} {self.consumer!r}>"

    # Commands: called from the engine's thread.

    def open(self, handoff_id: HandoffId, key: str) -> None:
        """Let blocks of a prompt be pulled while it is computed; `hold` or `abandon` follows."""
        num_groups = len(self._layout.groups)
        self._command(lambda: self.producer.open(handoff_id, key, num_groups))

    def grow(self, growth: Growth) -> None:
        self._command(lambda: self.producer.grow(growth))

    def revoke(self, handoff_id: HandoffId) -> None:
        """The blocks of an open prompt are about to be used for something else."""
        self._command(lambda: self.producer.revoke(handoff_id))

    def abandon(self, handoff_id: HandoffId, key: str) -> None:
        """An open prompt will not be finished."""
        self._command(lambda: self.producer.abandon(handoff_id, key))

    def hold(self, hold: Hold) -> None:
        self._command(lambda: self.producer.hold(hold, time.monotonic()))

    def abort(self, handoff_id: HandoffId) -> None:
        """End a hold that nobody will pull."""
        self._command(lambda: self.producer.end(handoff_id, ProducerEvent.ABORTED))

    def announce(self, offer: Offer) -> None:
        self._command(lambda: self.consumer.announce(offer, time.monotonic()))

    def give_up(self, offer: Offer) -> None:
        self._command(lambda: self._send(self.consumer.give_up(offer)))

    def pull(self, pull: Pull) -> None:
        self._command(lambda: self._send(self.consumer.start(pull, time.monotonic())))

    def cancel(self, key: str) -> None:
        self._command(lambda: self._send(self.consumer.cancel(key)))

    def wait(self, timeout_s: float) -> None:
        """Return as soon as a hold or a pull has ended since the last call, or `wake` is called."""
        self._has_news.wait(timeout_s)
        self._has_news.clear()

    def wake(self) -> None:
        """End a wait, the next one if there is none; from any thread."""
        self._has_news.set()

    def take_freed(self) -> list[str]:
        """Return and forget the engine keys whose holds ended since the last call."""
        return _drain(self._freed)

    def take_pulls(self) -> list[EndedPull]:
        """Return and forget the pulls that ended since the last call."""
        return _drain(self._pulls)

    def totals(self) -> dict[str, int]:
        """Return how often each thing has happened on this port since it opened.

        Each counter is copied in one step: the port's thread adds to it meanwhile.
        """
        totals = Counter(dict(self.counts))
        for counts in (self.producer.counts, self.consumer.counts, self._sockets.refused):
            totals.update(dict(counts))
        return dict(totals)

    def close(self) -> None:
        """Stop the thread and close every socket; held blocks are forgotten. Safe twice."""
        if self._is_closing:
            return
        self._is_closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.error("the KV plane of %s does not end: its thread is left", self.endpoint)
            return
        os.close(self._wake_fd)
        self._context.term()

    def _command(self, command: Callable[[], None]) -> None:
        """Have the port's thread run `command`; a closed port has nobody to tell."""
        if not self._is_closing:
            self._commands.append(command)
            os.eventfd_write(self._wake_fd, 1)

    # The port's thread.

    def _run(self) -> None:
        while not self._is_closing:
            self._guard(self._turn)
        for peer in list(self._links):
            self._close_link(peer)
        self._listener.close()
        self._sockets.close()
        for transport in self._transports.values():
            transport.close()

    def _guard(self, step: Callable[[], None]) -> None:
        """Run `step`; a dead thread would end all hand-offs and pin every held block."""
        try:
            step()
        except Exception:
            self.counts["port_errors"] += 1
            logger.exception("error on the KV plane of %s", self.endpoint)

    def _turn(self) -> None:
        ready = dict(self._poller.poll(_TICK_MS))
        if ready.pop(self._wake_fd, None):
            os.eventfd_read(self._wake_fd)
        self._run_commands()
        for socket in ready:
            if socket is self._listener:
                self._serve()
            else:
                self._receive(socket)
        self._tick()
        freed, pulls = _take(self.producer.freed), _take(self.consumer.results)
        self._freed.extend(freed)
        self._pulls.extend(pulls)
        if freed or pulls:
            self._has_news.set()

    def _run_commands(self) -> None:
        while self._commands:
            self._guard(self._commands.popleft())

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked_s > self._stall_timeout_s / 2:
            self._excuse(now)
        self._ticked_s = now
        self._answer(self.producer.tick(now))
        for order in self.consumer.tick(now):
            if isinstance(order.message, Release):
                self._distrust(order, now)
            self._send([order])
        for peer, link in list(self._links.items()):
            self._look_after(peer, link, now)

    def _excuse(self, now: float) -> None:
        """This process stood still, so that nothing was heard says nothing of the others."""
        self.consumer.excuse(now)
        for link in self._links.values():
            link.last_heard = now

    def _look_after(self, peer: Peer, link: Link, now: float) -> None:
        """Close a link that is idle or whose producer is gone, with what it maps of it."""
        is_over = link.is_idle(now) or link.is_dead(now, self._stall_timeout_s)
        # One whose connection has ended for good, as in `_send`, cannot say anything either.
        if is_over or not link.check(now):
            self._close_link(peer)

    def _distrust(self, order: Order, now: float) -> None:
        """A pull has stalled: drop its connections unless something else came over them. Bytes
        from elsewhere can make one wait for the rest of a frame that nobody has sent."""
        peer = self._way_to(order.endpoint, order.message.epoch)
        link = self._links.get(peer)
        if link is not None and now - link.last_heard >= self._stall_timeout_s:
            self._close_link(peer)

    def _serve(self) -> None:
        frames = self._listener.recv_multipart()
        try:
            message = CODEC.decode(frames[-1]) if len(frames) == 2 else None
        except WireError:
            message = None
        if isinstance(message, Greet | ReadBlocks | Renew | Release):
            self._answer(self.producer.handle(frames[0], message, time.monotonic()))
        else:
            self.counts["frames_malformed"] += 1

    def _answer(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            frames: list[bytes | zmq.Frame] = [answer.peer, CODEC.encode(answer.message)]
            if answer.frame is not None:
                frames.append(answer.frame)
            self._listener.send_multipart(frames, copy=False)

    def _receive(self, lane: zmq.Socket[bytes]) -> None:
        frames = lane.recv_multipart(copy=False)
        link = self._links[self._lanes[lane]]
        try:
            message = CODEC.decode(frames[0].buffer) if len(frames) <= 2 else None
        except WireError:
            message = None
        now = time.monotonic()
        if isinstance(message, Welcome):
            for refused in link.welcome(message, now):
                self._send(self.consumer.handle(refused, None, now))
            return
        link.last_heard = now
        if isinstance(message, Blocks):
            payload = link.open(message, frames[1].buffer if len(frames) == 2 else None)
            if isinstance(payload, Future):
                self._await(message, payload, now)
            else:
                self._send(self.consumer.handle(message, payload, now))
        elif isinstance(message, Filling | Refused):
            self._send(self.consumer.handle(message, None, now))
        else:
            self.counts["frames_malformed"] += 1

    def _await(self, message: Blocks, payload: Future[Payload], since: float) -> None:
        """Go on with a chunk on this thread once it is there, or with why it is not."""

        def arrive() -> None:
            now = time.monotonic()
            if (error := payload.exception()) is not None:
                lost = Refused(message.handoff_id, Refusal.TRANSPORT, str(error))
                self._send(self.consumer.handle(lost, None, now))
                return
            held_s = None if message.held_s is None else message.held_s + now - since
            arrived = replace(message, held_s=held_s)
            self._send(self.consumer.handle(arrived, payload.result(), now))

        payload.add_done_callback(lambda _: self._command(arrive))

    def _send(self, orders: Iterable[Order]) -> None:
        for order in orders:
            peer = self._way_to(order.endpoint, order.message.epoch)
            try:
                self._link(peer).send(order.message, time.monotonic())
            except zmq.Again:
                # Bytes that were no frames, or not the peer's, ended a connection for good.
                self._close_link(peer)
                self._link(peer).send(order.message, time.monotonic())

    def _way_to(self, endpoint: str, epoch: int) -> Peer:
        """Return the peer under the key in use; under an earlier one until that has answered.

        Nodes learn of keys one after the other. What is not used any more ends when it is idle.
        """
        newest = endpoint, epoch, self._sockets.key
        if newest in self._links and self._links[newest].is_welcome:
            return newest
        for peer, link in self._links.items():
            if peer[:2] == newest[:2] and peer != newest and link.is_welcome:
                self._link(newest).greet_once(time.monotonic())
                return peer
        return newest

    def _link(self, peer: Peer) -> Link:
        """Return the link to a peer, made if there is none."""
        link = self._links.get(peer)
        if link is None:
            open_lane = functools.partial(self._open_lane, peer)
            link = Link(peer[1], self._transports, self._num_lanes, open_lane)
            self._links[peer] = link
        return link

    def _open_lane(self, peer: Peer) -> zmq.Socket[bytes]:
        lane: zmq.Socket[bytes] = self._sockets.open(zmq.DEALER, MAX_FRAME_BYTES)
        try:
            self._sockets.connect(lane, peer[0])
        except zmq.ZMQError:
            lane.close()
            raise
        self._poller.register(lane, zmq.POLLIN)
        self._lanes[lane] = peer
        return lane

    def _close_link(self, peer: Peer) -> None:
        link = self._links.pop(peer)
        for lane in link.lanes:
            self._poller.unregister(lane)
            del self._lanes[lane]
        link.close()


def _drain(queue: "deque[Entry]") -> list[Entry]:
    return [queue.popleft() for _ in range(len(queue))]


def _take(entries: list[Entry]) -> list[Entry]:
    taken = entries[:]
    entries.clear()
    return taken
