"""Channels over NCCL: from one GPU's memory into another's, of any two hosts.

A communicator of two has a name, which its reader makes and its read brings to the producer. The
bytes are not encrypted, and NCCL lets in whoever knows the name: for networks that are trusted.
"""

import threading
import time
from contextlib import AbstractContextManager

import torch

from kv_transfer.channels import ChannelBroken
from kv_transfer.nccl_library import ID_BYTES, NcclLibrary
from kv_transfer.protocol import Via

_READER, _PRODUCER = 0, 1
_POLL_S = 50e-6


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
        stream = torch.cuda.current_stream(self._device)
        self._library.send(
            memory.data_ptr(),
            memory.nbytes,
            self._peer,
            self._live(),
            stream.cuda_stream,
            self._timeout_s,
        )
        self._finish(stream)

    def receive(self, memory: torch.Tensor) -> None:
        stream = torch.cuda.current_stream(self._device)
        self._library.receive(
            memory.data_ptr(),
            memory.nbytes,
            self._peer,
            self._live(),
            stream.cuda_stream,
            self._timeout_s,
        )
        self._finish(stream)

    def abort(self) -> None:
        with self._lock:
            communicator, self._communicator = self._communicator, None
        if communicator is not None:
            self._library.abort(communicator)

    def _live(self) -> int:
        if self._communicator is None:
            raise ChannelBroken("closed")
        return self._communicator

    def _finish(self, stream: torch.cuda.Stream) -> None:
        """Wait for the stream. A dead peer keeps it waiting, on the GPU, until the abort."""
        deadline = time.monotonic() + self._timeout_s
        while not stream.query():
            self._library.check(self._live())
            if time.monotonic() >= deadline:
                raise ChannelBroken(f"nothing came through for {self._timeout_s:.1f} s")
            time.sleep(_POLL_S)
        # An abort ends what the stream was waiting for as well.
        self._live()
