"""Memory that processes of one host share, without a name in any file system.

A segment is an anonymous file (`memfd`): it cannot be left behind, is not limited by the size of
`/dev/shm`, and is gone with the last process that maps it, however that ends. Others open it
through its owner's `/proc/<pid>/fd`, which the kernel allows to the same user in the same process
namespace only.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kv_transfer.arena import TOKEN_BYTES

_NAME = "tandem-kv"
# Nobody can shrink it under a reader, which would be a SIGBUS there.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@cache
def boot_id() -> str:
    """Return what names this boot of this host's kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a segment is: on which host, in whose file table, and how to recognise its content."""

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

    def map(self) -> memoryview | None:
        """Return the segment to read, None if it is not of this host or none of ours.

        Raises `OSError` or `ValueError` if the kernel does not let us.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        # Others are not even opened: a tape would rewind.
        if self.boot_id != boot_id() or not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                return None
            # Not populated: a consumer maps one per producer, and its pages are there already.
            size = os.fstat(fd).st_size
            return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
        finally:
            os.close(fd)


class OwnSegment:
    """Touched pages of ours in `memory`, which others find at `place` until this is closed."""

    def __init__(self, num_bytes: int) -> None:
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, num_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self.memory = memoryview(mmap.mmap(self._fd, num_bytes, flags))
        except BaseException:
            os.close(self._fd)
            raise
        self.place = Segment(boot_id(), os.getpid(), self._fd, os.urandom(TOKEN_BYTES))

    def close(self) -> None:
        os.close(self._fd)
