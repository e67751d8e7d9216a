"""Payloads through memory that two processes of one host share: one copy in, one copy out.

The arena is an anonymous file (`memfd`): it has no name that could be left behind, is not
limited by the size of `/dev/shm`, and is gone with the last process that maps it, however that
ends. Consumers open it through the producer's `/proc/<pid>/fd`, which the kernel allows to the
same user in the same process namespace only; elsewhere attaching fails and another transport
is used.
"""

import fcntl
import mmap
import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kv_transfer.arena import TOKEN_BYTES, Arena, ArenaInlet, ArenaShape
from kv_transfer.protocol import Via
from kv_transfer.transport import Stage

_NAME = "tandem-kv"
# Nobody can shrink it under a reader, which would be a SIGBUS there.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@cache
def boot_id() -> str:
    """Return what names this boot of this host's kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Segment:
    """Where an arena is: on which host, in whose file table, and how to recognise it."""

    boot_id: str
    pid: int
    fd: int
    token: bytes

    def __str__(self) -> str:
        return f"{self.boot_id}/{self.pid}/{self.fd}/{self.token.hex()}"

    @classmethod
    def parse(cls, address: str) -> "Segment":
        """Return the segment an address names; raise `ValueError`."""
        host, pid, fd, token = address.split("/")
        if not (pid.isascii() and pid.isdigit() and fd.isascii() and fd.isdigit()):
            raise ValueError(f"{address!r} names no process and file")
        return cls(host, int(pid), int(fd), bytes.fromhex(token))

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


class ShmTransport:
    """An arena of touched pages, made when the first consumer asks for it."""

    via = Via.SHM

    def __init__(self, shape: ArenaShape) -> None:
        self._shape = shape
        self._fd: int | None = None
        self._arena: Arena | None = None
        self._token = os.urandom(TOKEN_BYTES)

    def address(self) -> str:
        if self._fd is None:
            self._fd = self._create()
        return str(Segment(boot_id(), os.getpid(), self._fd, self._token))

    def attach(self, address: str) -> ArenaInlet | None:
        try:
            segment = Segment.parse(address)
            if segment.boot_id != boot_id() or not _is_arena(segment.path):
                return None
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            return None
        try:
            return _map(fd, segment.token)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        return num_bytes <= self._shape.slot_bytes

    def stage(self, num_bytes: int, reader: str) -> Stage | None:
        return self._arena.stage(num_bytes) if self._arena is not None else None

    def free(self, parcel: int) -> None:
        if self._arena is not None:
            self._arena.free(parcel)

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _create(self) -> int:
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self._shape.total_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = memoryview(mmap.mmap(fd, self._shape.total_bytes, flags))
            self._arena = Arena(memory, self._shape, self._token, random.SystemRandom())
        except BaseException:
            os.close(fd)
            raise
        return fd


def _is_arena(path: str) -> bool:
    """Whether a peer's file is one of ours: others are not even opened, a tape would rewind."""
    return os.readlink(path).startswith(f"/memfd:{_NAME}")


def _map(fd: int, token: bytes) -> ArenaInlet | None:
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        return None
    size = os.fstat(fd).st_size
    # Not populated: a consumer maps an arena per producer, and its pages are there already.
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    return ArenaInlet.over(memoryview(memory), token)
