"""The one place where sockets that others reach are made: their limits, and who may connect.

With a ring (`cluster/keyring.py`) every socket speaks CURVE: what goes over it is encrypted, peers
without a key of the ring are dropped in the handshake and counted, and who connects knows whom he
reaches, because an address says the listener's public key: `tcp://host:port#<hex>`. Without one,
addresses have no such part. Sockets live long, so no request waits for a handshake.
"""

import logging
import os
import threading
from collections import Counter
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from cluster.keyring import KeyPair, public_of_text, public_text
from cluster.ring_file import KeySource
from cluster.seldom import Seldom

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
# libzmq asks nobody, and lets everybody in, if there is no domain.
_ZAP_DOMAIN = b"tandem"
_HANDSHAKE_MS = 5000
# Which of them it is depends on who of the two hangs up first.
_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_CLOSE_S = 2.0
# Who is refused comes again many times a second.
_QUIET_S = 10.0

logger = logging.getLogger(__name__)


def plain_address(endpoint: str) -> str:
    """Return an address without the key of whoever listens there."""
    return endpoint.partition("#")[0]


class Sockets:
    """Makes the sockets of one ZeroMQ context, at most one of which listens.

    `refused` counts the connections that it did not take: `key` for a stranger's, `protocol` for
    those without CURVE or meant for another server. Keys begin with `peers_`.
    """

    def __init__(self, context: zmq.Context[Any], keys: KeySource | None = None) -> None:
        self.refused: Counter[str] = Counter()
        self._context = context
        self._keys = keys
        self._doorkeeper: _Doorkeeper | None = None

    @property
    def key(self) -> str:
        """Return the name of the pair in use towards others, empty without keys."""
        return self._keys().used.name if self._keys is not None else ""

    def open(self, kind: int, max_bytes: int) -> Any:
        """Return a socket of the context; larger frames end the connection they come on."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        return socket

    def listen(self, socket: Any, host: str) -> str:
        """Bind to a port of the kernel's choice and return the address to connect to."""
        fragment = ""
        if self._keys is not None:
            pair = KeyPair.generate()
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
            socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
            self._doorkeeper = _Doorkeeper(self._context, socket, self._keys, self.refused)
            fragment = f"#{public_text(pair.public)}"
        port = socket.bind_to_random_port(f"tcp://{host}")
        return f"tcp://{host}:{port}{fragment}"

    def connect(self, socket: Any, endpoint: str) -> None:
        """Connect to an address that `listen` returned; raise `ZMQError` if it is none, or if one
        of the two sides has keys and the other has not."""
        address, _, text = endpoint.partition("#")
        if bool(text) != (self._keys is not None):
            raise zmq.ZMQError(zmq.EINVAL, f"{address}: only one side has CURVE keys")
        if self._keys is not None:
            try:
                server = public_of_text(text)
            except ValueError as error:
                raise zmq.ZMQError(zmq.EINVAL, f"{address}: {error}") from None
            used = self._keys().used
            socket.setsockopt(zmq.CURVE_SERVERKEY, server)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, used.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, used.secret)
        socket.connect(address)

    def close(self) -> None:
        """Stop answering for newcomers; close the sockets first."""
        if self._doorkeeper is not None:
            self._doorkeeper.close()
            self._doorkeeper = None


class _Doorkeeper:
    """The thread that answers libzmq's question whether a peer may come in (ZAP, RFC 27), and
    counts those that did not. It holds up handshakes and nothing else."""

    def __init__(
        self, context: zmq.Context[Any], listener: Any, keys: KeySource, refused: Counter[str]
    ) -> None:
        # Plain sockets, whatever the context's own are.
        shadow: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._keys = keys
        self._refused = refused
        self._warnings = Seldom(_QUIET_S)
        self._door = shadow.socket(zmq.REP, socket_class=zmq.Socket)
        self._door.bind(_ZAP_ADDRESS)
        events = f"inproc://tandem-monitor-{id(self):x}"
        listener.monitor(events, _FAILURES)
        self._events = shadow.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._events.connect(events)
        for socket in (self._door, self._events):
            socket.setsockopt(zmq.LINGER, 0)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_CLOSE_S)
        os.close(self._wake_fd)

    def _run(self) -> None:
        poller = zmq.Poller()
        for watched in (self._door, self._events, self._wake_fd):
            poller.register(watched, zmq.POLLIN)
        while self._wake_fd not in (ready := dict(poller.poll())):
            if self._door in ready:
                self._answer(self._door.recv_multipart())
            if self._events in ready:
                self._note(self._events.recv_multipart())
        self._door.close()
        self._events.close()

    def _answer(self, question: list[bytes]) -> None:
        """Answer one question; whatever goes wrong keeps the peer out."""
        version, request, _domain, address, _identity, mechanism, *credentials = question
        is_member = False
        try:
            is_member = mechanism == b"CURVE" and self._keys().accepts(credentials[0])
        except Exception:
            logger.exception("a peer is kept out because the keys could not be asked")
        if not is_member:
            self._refuse(address.decode(errors="replace"))
        # 300 closes the connection without a word. A 400 would end the peer's attempts for good,
        # and members may come under a new key before it has arrived here.
        status = b"200" if is_member else b"300"
        self._door.send_multipart([version, request, status, b"", b"", b""])

    def _refuse(self, address: str) -> None:
        self._refused["peers_key"] += 1
        if self._warnings.is_due():
            number = self._refused["peers_key"]
            logger.warning("refused %s: no key of this deployment (%d so far)", address, number)

    def _note(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)
        if event["event"] & _FAILURES:
            self._refused["peers_protocol"] += 1
