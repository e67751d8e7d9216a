"""Channels over gloo, torch's own transport between the memory of hosts: TCP, without a GPU.

Slower than frames, so nobody is given it who does not name it; it shows that what `nccl` goes
through works. Neither end says who it is and nothing is encrypted: for networks that are trusted.
"""

import socket
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore

from kv_transfer.channels import ChannelBroken
from kv_transfer.protocol import Via

_READER, _PRODUCER = 0, 1


class GlooBackend:
    """Meets and listens on `host`; calls take `timeout_s` at most."""

    via = Via.GLOO
    device = torch.device("cpu")

    def __init__(self, host: str, timeout_s: float) -> None:
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)

    def invite(self) -> "GlooInvitation":
        return GlooInvitation(self._host, self._timeout)

    def join(self, address: str) -> "GlooChannel":
        host, _, port = address.rpartition(":")
        if not (host and port.isascii() and port.isdigit()):
            raise ChannelBroken(f"{address!r} is no host and port")
        store = TCPStore(host, int(port), timeout=self._timeout, wait_for_workers=False)
        return GlooChannel(store, _PRODUCER, self._host, self._timeout)

    def ordered(self) -> AbstractContextManager[object]:
        return nullcontext()


class GlooInvitation:
    """A store where two meet, for as long as this or what becomes of it lives."""

    def __init__(self, host: str, timeout: timedelta) -> None:
        self._host = host
        self._timeout = timeout
        # Left to itself, the store listens on all interfaces.
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def accept(self) -> "GlooChannel":
        return GlooChannel(self._store, _READER, self._host, self._timeout)


class GlooChannel:
    """A group of two, outside of any default group."""

    def __init__(self, store: TCPStore, rank: int, host: str, timeout: timedelta) -> None:
        self._peer = 1 - rank
        self._timeout = timeout
        # More than torch's stubs know of.
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timeout
        options._threads = 1
        options._devices = [gloo.create_device(hostname=host)]
        try:
            self._group = gloo(store, rank, 2, options)
        except RuntimeError as error:
            raise ChannelBroken(f"the other side does not come: {_plain(error)}") from error

    def send(self, memory: torch.Tensor) -> None:
        try:
            self._group.send([memory], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise ChannelBroken(_plain(error)) from error

    def receive(self, memory: torch.Tensor) -> None:
        try:
            self._group.recv([memory], self._peer, 0).wait(self._timeout)
        except RuntimeError as error:
            raise ChannelBroken(_plain(error)) from error

    def abort(self) -> None:
        self._group.abort()


def _plain(error: RuntimeError) -> str:
    """Return what a message of gloo's says first, without the place in its sources."""
    text = str(error)
    return text.partition("] ")[2].partition(". ")[0] if text.startswith("[") else text
