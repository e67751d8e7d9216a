"""Channels over NCCL: from one GPU's memory into another's, of any two hosts.

A communicator of two has a name, which its reader makes and its read brings to the producer. The
bytes are not encrypted, and NCCL lets in whoever knows the name: for networks that are trusted.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from kv_transfer.channels import ChannelBroken
from kv_transfer.nccl_library import ID_BYTES, POLL_S, NcclLibrary
from kv_transfer.protocol import Via

_READER, _PRODUCER = 0, 1


class NcclBackend:
    """Channels between `device` and others' GPUs; calls take `timeout_s` at most."""

    via = Via.NCCL

    def __init__(self, device: str, timeout_s: float, library: NcclLibrary | None = None) -> None:
        self.device = torch.device(device)
        self._timeout_s = timeout_s
        self._library = library or NcclLibrary()

    def invite(self) -> "NcclInvitation":
        return NcclInvitation(self._library, self.device, self._timeout_s)

    def join(self, address: str) -> "NcclChannel":
        try:
            name = bytes.fromhex(address)
        except ValueError:
            name = b""
        if len(name) != ID_BYTES:
            raise ChannelBroken(f"{address[:32]!r} is no communicator's name")
        return NcclChannel(self._library, self.device, name, _PRODUCER, self._timeout_s)

    def ordered(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(self.device))
        return context


class NcclInvitation:
    """A communicator's name, before anybody has joined."""

    def __init__(self, library: NcclLibrary, device: torch.device, timeout_s: float) -> None:
        self._library = library
        self._device = device
        self._timeout_s = timeout_s
        self._name = library.unique_id()
        self.address = self._name.hex()

    def accept(self) -> "NcclChannel":
        return NcclChannel(self._library, self._device, self._name, _READER, self._timeout_s)


class NcclChannel:
    """One end of a communicator, used on the calling thread's current stream."""

    def __init__(
        self, library: NcclLibrary, device: torch.device, name: bytes, rank: int, timeout_s: float
    ) -> None:
        self._library = library
        self._device = device
        self._peer = 1 - rank
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._communicator: int | None = library.join(name, rank, timeout_s)

    def send(self, memory: torch.Tensor) -> None:
        self._move(self._library.send, memory)

    def receive(self, memory: torch.Tensor) -> None:
        self._move(self._library.receive, memory)

    def abort(self) -> None:
        # Each call is made with the lock, so none is under way with what is given back here.
        with self._lock:
            communicator, self._communicator = self._communicator, None
        if communicator is not None:
            self._library.abort(communicator)

    def _move(self, call: Callable[[int, int, int, int, int], None], memory: torch.Tensor) -> None:
        """Make the call and wait for its stream. A dead peer keeps that waiting, on the GPU, until
        the abort."""
        deadline = time.monotonic() + self._timeout_s
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            place = memory.data_ptr(), memory.nbytes, self._peer
            call(*place, self._live(), stream.cuda_stream)
        while self._is_busy() or not stream.query():
            if time.monotonic() >= deadline:
                raise ChannelBroken(f"nothing came through for {self._timeout_s:.1f} s")
            time.sleep(POLL_S)
        # An abort ends what the stream was waiting for as well.
        with self._lock:
            self._live()

    def _is_busy(self) -> bool:
        with self._lock:
            return self._library.is_busy(self._live())

    def _live(self) -> int:
        if self._communicator is None:
            raise ChannelBroken("closed")
        return self._communicator
