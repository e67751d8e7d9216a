"""Somebody between two ends of a connection, who may change what passes: bytes, or frames."""

import contextlib
import selectors
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq

# Called with what passes and which way it goes; returns what is passed on.
Bytes = Callable[[bytes, bool], bytes | None]
Frames = Callable[[list[bytes], bool], Sequence[list[bytes]]]


def pass_bytes(data: bytes, _is_answer: bool) -> bytes | None:
    return data


class _Middleman(ABC):
    """Forwards on a thread of its own, from the beginning of the block to its end."""

    def __init__(self) -> None:
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """Forward until `_is_closing`."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of what is left when the thread has ended."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_closing = True
        self._thread.join(5)
        self._close()


class ByteMiddleman(_Middleman):
    """Forwards TCP connections to `port`; `change` sees every piece that was read.

    None from `change` cuts the connection.
    """

    def __init__(self, port: int, change: Bytes = pass_bytes) -> None:
        super().__init__()
        self.change = change
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, tuple[socket.socket, bool]] = {}

    def _close(self) -> None:
        for each in [*self._peers, self._listener]:
            each.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(timeout=0.05):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._peers:
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        ours, _ = self._listener.accept()
        theirs = socket.create_connection(("127.0.0.1", self._target))
        for each, other, is_answer in ((ours, theirs, False), (theirs, ours, True)):
            self._peers[each] = other, is_answer
            self._selector.register(each, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        other, is_answer = self._peers[end]
        data = b""
        with contextlib.suppress(OSError):
            data = end.recv(1 << 16)
        changed = self.change(data, is_answer) if data else None
        try:
            if changed is not None:
                other.sendall(changed)
                return
        except OSError:
            pass
        for each in (end, other):
            if self._peers.pop(each, None) is not None:
                self._selector.unregister(each)
                each.close()


class FrameMiddleman(_Middleman):
    """Forwards ZeroMQ messages without keys, each peer over a connection of its own."""

    def __init__(self, endpoint: str, change: Frames) -> None:
        super().__init__()
        self.change = change
        self._target = endpoint
        self._context: zmq.Context[Any] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.LINGER, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._backs: dict[bytes, Any] = {}

    def _close(self) -> None:
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._is_closing:
            ready = dict(poller.poll(50))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                if peer not in self._backs:
                    back = self._backs[peer] = self._context.socket(zmq.DEALER)
                    back.setsockopt(zmq.LINGER, 0)
                    back.connect(self._target)
                    poller.register(back, zmq.POLLIN)
                for changed in self.change(frames, False):
                    self._backs[peer].send_multipart(changed)
            for peer, back in self._backs.items():
                if back in ready:
                    for changed in self.change(back.recv_multipart(), True):
                        self._front.send_multipart([peer, *changed])
        for each in (self._front, *self._backs.values()):
            each.close()
