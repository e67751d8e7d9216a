"""A stand-in for a GPU: its memory is the host's, and other processes map it by a handle."""

import mmap
import os
import weakref
from collections.abc import Container
from pathlib import Path

import torch

from kv_transfer.cuda_library import HANDLE_BYTES


class HostDevice:
    """Files for allocations, opened through `/proc`; counts what is mapped and fetched."""

    def __init__(self, uuid: str, unreachable: Container[str] = ()) -> None:
        self.uuid = uuid
        self.num_mapped = self.num_fetched = 0
        self._unreachable = unreachable

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        fd = os.memfd_create("tandem-kv-device")
        os.ftruncate(fd, num_bytes)
        memory = mmap.mmap(fd, num_bytes)
        # The file can be opened for as long as the memory is in use.
        weakref.finalize(memory, os.close, fd)
        handle = f"/proc/{os.getpid()}/fd/{fd}".encode().ljust(HANDLE_BYTES)
        return torch.frombuffer(memory, dtype=torch.uint8), handle

    def reaches(self, uuid: str) -> bool:
        return uuid not in self._unreachable

    def map(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        with Path(handle.decode().strip()).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), num_bytes)
        self.num_mapped += 1
        return torch.frombuffer(memory, dtype=torch.uint8)

    def unmap(self, memory: torch.Tensor) -> None:
        self.num_mapped -= 1

    def fetch(self, memory: torch.Tensor) -> torch.Tensor:
        self.num_fetched += 1
        return memory.clone()
