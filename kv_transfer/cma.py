"""Payloads that their reader copies straight out of the producer's blocks: one copy, no arena.

The kernel copies from one process into another (`process_vm_readv(2)`, "cross-memory attach"),
where it would let the one debug the other: the same user in the same process namespace, and
`kernel.yama.ptrace_scope` 0 where there is Yama. Elsewhere attaching fails and another way is
used. The engine takes blocks of unfinished prompts back when it likes, so only what is held goes
this way; a *serial* that the producer takes away before it frees blocks tells a reader, after it
has read, that they still were what was announced.
"""

import ctypes
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kv_transfer.blocks import Region, Regions
from kv_transfer.protocol import Blocks, Via
from kv_transfer.segments import boot_id
from kv_transfer.transport import Payload, Stage

Words = NDArray[np.uint64]

_NUM_SERIALS = 1024
_TOKEN_WORDS = 2
# Of one call, by the kernel (IOV_MAX).
_MOST_PIECES = 1024
# From here on two threads copy: a page table lock and a core's bandwidth are less than memory's.
_SHARED_BYTES = 4 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


def pieces(regions: Sequence[Region], block_ids: Sequence[int]) -> Words:
    """Return address and size of each block in each region, [regions * blocks, 2].

    Raises `OverflowError` for what is no number of a block.
    """
    bases = np.array([region.address for region in regions], np.uint64)
    strides = np.array([region.stride for region in regions], np.uint64)
    found = np.empty((len(regions), len(block_ids), 2), np.uint64)
    np.multiply.outer(strides, np.array(block_ids, np.uint64), out=found[:, :, 0])
    found[:, :, 0] += bases[:, None]
    found[:, :, 1] = np.array([region.size for region in regions], np.uint64)[:, None]
    return found.reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a reader needs to know: whose memory, how to recognise it, and what is where in it."""

    boot_id: str
    pid: int
    serials: int
    token: bytes
    regions: tuple[tuple[Region, ...], ...]

    def __str__(self) -> str:
        words = ";".join(
            ",".join(f"{r.address:x}+{r.stride:x}+{r.size:x}" for r in group)
            for group in self.regions
        )
        return f"{self.boot_id}/{self.pid}/{self.serials:x}/{self.token.hex()}/{words}"

    @classmethod
    def parse(cls, address: str) -> "_Place":
        """Return the place an address names; raise `ValueError`."""
        host, pid, serials, token, words = address.split("/")
        regions = tuple(
            tuple(_region(word) for word in group.split(",")) for group in words.split(";")
        )
        return cls(host, int(pid), int(serials, 16), bytes.fromhex(token), regions)


def _region(word: str) -> Region:
    address, stride, size = word.split("+")
    return Region(int(address, 16), int(stride, 16), int(size, 16))


class CmaTransport:
    """The blocks themselves; a serial is handed out for each chunk that is announced."""

    via = Via.CMA

    def __init__(self, regions: Regions) -> None:
        self._regions = tuple(tuple(group) for group in regions)
        self._token = secrets.token_bytes(_TOKEN_WORDS * 8)
        self._words = np.zeros(_TOKEN_WORDS + _NUM_SERIALS, np.uint64)
        self._words[:_TOKEN_WORDS] = np.frombuffer(self._token, np.uint64)
        self._free = list(range(_NUM_SERIALS))
        self._out: set[int] = set()
        # Another process at this address, of another life, must not have the same serials.
        self._serial = secrets.randbits(48)
        self._copier = _Copier()

    def address(self) -> str:
        serials = self._words.ctypes.data
        return str(_Place(boot_id(), os.getpid(), serials, self._token, self._regions))

    def attach(self, address: str) -> "CmaInlet | None":
        try:
            place = _Place.parse(address)
            shape = [len(group) for group in place.regions]
            if place.boot_id != boot_id() or shape != [len(group) for group in self._regions]:
                return None
            found = np.empty(_TOKEN_WORDS, np.uint64)
            _read_words(place.pid, place.serials, found)
        except (OSError, ValueError, OverflowError, ctypes.ArgumentError):
            return None
        return CmaInlet(place, self._copier) if found.tobytes() == place.token else None

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        return True

    def stage(self, num_bytes: int, reader: str) -> Stage | None:
        if not self._free:
            return None
        slot = self._free.pop()
        self._serial += 1
        self._words[_TOKEN_WORDS + slot] = self._serial
        parcel = self._serial * _NUM_SERIALS + slot
        self._out.add(parcel)
        return Stage(parcel, memoryview(b""))

    def free(self, parcel: int) -> None:
        """From here on readers who are still at it find out."""
        if parcel in self._out:
            self._out.remove(parcel)
            self._words[_TOKEN_WORDS + parcel % _NUM_SERIALS] = 0
            self._free.append(parcel % _NUM_SERIALS)

    def close(self) -> None:
        self._words[_TOKEN_WORDS:] = 0
        self._copier.close()


class CmaInlet:
    """A reader's view of one producer's blocks; trusts nothing that is written there."""

    def __init__(self, place: _Place, copier: "_Copier") -> None:
        self._place = place
        self._copier = copier

    def door(self) -> str:
        return ""

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | None:
        is_known = 0 <= message.group < len(self._place.regions)
        if frame is not None or not is_known or len(message.block_ids) != message.num_blocks:
            return None
        parcel = message.parcel
        if not message.block_ids or not self._holds(parcel):
            return None
        regions = self._place.regions[message.group]
        content = RemoteBlocks(self._place.pid, regions, message.block_ids, self._copier)
        return Payload(content, lambda: self._holds(parcel))

    def close(self) -> None:
        """Nothing is held between messages."""

    def _holds(self, parcel: int) -> bool:
        serial, slot = divmod(parcel, _NUM_SERIALS)
        found = np.zeros(1, np.uint64)
        try:
            _read_words(self._place.pid, self._place.serials + 8 * (_TOKEN_WORDS + slot), found)
        except OSError:
            return False
        # A free serial is 0, and no parcel has that one.
        return bool(found[0] == serial > 0)


class RemoteBlocks:
    """Blocks in another process. Until somebody copies them they take no memory, whatever a peer
    may have said of them: `nbytes` is checked before."""

    def __init__(
        self, pid: int, regions: Sequence[Region], block_ids: Sequence[int], copier: "_Copier"
    ) -> None:
        self.nbytes = len(block_ids) * sum(region.size for region in regions)
        self._pid = pid
        self._regions = regions
        self._block_ids = block_ids
        self._copier = copier

    def copy_to(self, ours: Words) -> None:
        """Copy them, region by region, to the pieces `ours` of the same sizes; raise `OSError`."""
        self._copier.copy(self._pid, self._theirs(), ours)

    def fetch(self) -> memoryview:
        """Return a copy, region by region; raise `OSError`."""
        content, theirs = np.empty(self.nbytes, np.uint8), self._theirs()
        ours = theirs.copy()
        ours[:, 0] = np.cumsum(theirs[:, 1]) - theirs[:, 1]
        ours[:, 0] += np.uint64(content.ctypes.data)
        self._copier.copy(self._pid, theirs, ours)
        return content.data

    def _theirs(self) -> Words:
        try:
            return pieces(self._regions, self._block_ids)
        except OverflowError as error:
            raise OSError(f"no such blocks in process {self._pid}: {error}") from None


class _Copier:
    """Copies from other processes, large ones with a second thread. Without the GIL."""

    def __init__(self) -> None:
        self._second: ThreadPoolExecutor | None = None

    def copy(self, pid: int, theirs: Words, ours: Words) -> None:
        half = len(theirs) // 2
        if int(theirs[:, 1].sum()) < _SHARED_BYTES or not half:
            _copy(pid, theirs, ours)
            return
        if self._second is None:
            self._second = ThreadPoolExecutor(1, "cma-copier")
        rest = self._second.submit(_copy, pid, theirs[half:], ours[half:])
        try:
            _copy(pid, theirs[:half], ours[:half])
        finally:
            # Its blocks may not be let go of while somebody writes to them.
            rest.result()

    def close(self) -> None:
        if self._second is not None:
            self._second.shutdown()
            self._second = None


def _copy(pid: int, theirs: Words, ours: Words) -> None:
    for begin in range(0, len(theirs), _MOST_PIECES):
        part = slice(begin, begin + _MOST_PIECES)
        _read(pid, theirs[part], ours[part])


def _read_words(pid: int, address: int, into: Words) -> None:
    """Fill `into` from another process's memory; raise `OSError`."""
    theirs = np.array([[address, into.nbytes]], np.uint64)
    _read(pid, theirs, np.array([[into.ctypes.data, into.nbytes]], np.uint64))


def _read(pid: int, theirs: Words, ours: Words) -> None:
    wanted = int(ours[:, 1].sum())
    copied = _libc.process_vm_readv(
        pid, ours.ctypes.data, len(ours), theirs.ctypes.data, len(theirs), 0
    )
    if copied != wanted:
        error = ctypes.get_errno() if copied < 0 else 0
        why = os.strerror(error) if error else f"{copied} of {wanted} bytes"
        raise OSError(error, f"process {pid}: {why}")
