"""Payloads in a GPU's memory that processes of the same host map: from GPU to GPU, without NCCL.

An arena as in `shm`, but that its slots lie in the producer's GPU and only the header in pages of
the host. The producer gathers into a slot and has its GPU finish before the chunk is announced;
the consumer reads it there, or fetches it in one copy if its own GPU is another one.
"""

import logging
import random
from dataclasses import dataclass
from typing import Protocol

import torch

from kv_transfer.arena import PAGE_BYTES, Arena, ArenaInlet, ArenaShape, ArenaTransport
from kv_transfer.cuda_library import HANDLE_BYTES, CudaLibrary
from kv_transfer.protocol import Blocks, Via
from kv_transfer.segments import OwnSegment, Segment
from kv_transfer.transport import Payload

# What CUDA maps at the least: a smaller piece would come with its neighbours.
_UNIT_BYTES = 2 << 20

logger = logging.getLogger(__name__)


class Device(Protocol):
    """One GPU's memory, and what it sees of others'. Whatever it cannot do is an `OSError`."""

    uuid: str

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        """Return memory [num_bytes] until this process ends, and a handle of `HANDLE_BYTES`."""
        ...

    def reaches(self, uuid: str) -> bool:
        """Return whether another GPU's memory may be read from this one."""
        ...

    def map(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        """Return another process's memory [num_bytes] as if it were this GPU's."""
        ...

    def unmap(self, memory: torch.Tensor) -> None:
        """Let go of what `map` returned."""
        ...

    def fetch(self, memory: torch.Tensor) -> torch.Tensor:
        """Return a copy in this GPU's own memory, made before this returns."""
        ...


class CudaDevice:
    """The GPU of this name, by CUDA's runtime."""

    def __init__(self, name: str, library: CudaLibrary | None = None) -> None:
        self._device = torch.device(name)
        self._library = library or CudaLibrary()
        self._stream = torch.cuda.Stream(self._device)
        self.uuid = _uuid(self._device)

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        with torch.cuda.device(self._device):
            pointer = self._library.allocate(-(-num_bytes // _UNIT_BYTES) * _UNIT_BYTES)
            try:
                handle = self._library.handle_of(pointer)
            except OSError:
                self._library.free(pointer)
                raise
        return self._tensor(pointer, num_bytes), handle

    def reaches(self, uuid: str) -> bool:
        if uuid == self.uuid:
            return True
        for number in range(torch.cuda.device_count()):
            other = torch.device("cuda", number)
            if _uuid(other) == uuid:
                is_peer: bool = torch.cuda.can_device_access_peer(self._device, other)
                return is_peer
        # One that this process is not shown may be read all the same: `map` will tell.
        return True

    def map(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            return self._tensor(self._library.open(handle), num_bytes)

    def unmap(self, memory: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            self._library.close(memory.data_ptr())

    def fetch(self, memory: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            fetched = memory.clone()
        self._stream.synchronize()
        return fetched

    def _tensor(self, pointer: int, num_bytes: int) -> torch.Tensor:
        """Return the memory there. By its address, torch would take another GPU's for that one's,
        and do there what is done with it."""
        storage = torch._C._construct_storage_from_data_pointer(pointer, self._device, num_bytes)
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


@dataclass(frozen=True, slots=True)
class _Address:
    """Where an arena has its header, on which GPU its slots are, and what opens them."""

    header: Segment
    uuid: str
    handle: bytes

    def __str__(self) -> str:
        return f"{self.header}/{self.uuid}/{self.handle.hex()}"

    @classmethod
    def parse(cls, address: str) -> "_Address":
        """Return what an address names; raise `ValueError`."""
        header, uuid, handle = address.rsplit("/", 2)
        found = cls(Segment.parse(header), uuid, bytes.fromhex(handle))
        if len(found.handle) != HANDLE_BYTES:
            raise ValueError(f"a handle of {len(found.handle)} bytes")
        return found


class CudaIpcTransport(ArenaTransport):
    """An arena in the memory of `device`, made when the first consumer asks for it."""

    via = Via.CUDA_IPC

    def __init__(self, shape: ArenaShape, device: Device) -> None:
        super().__init__(shape)
        self._device = device
        self._header: OwnSegment | None = None
        self._address = ""

    def address(self) -> str:
        if self._header is None:
            header = OwnSegment(PAGE_BYTES)
            try:
                slots, handle = self._device.allocate(self._shape.slots_bytes)
            except BaseException:
                header.close()
                raise
            token, rng = header.place.token, random.SystemRandom()
            self._arena = Arena(header.memory, self._shape, token, rng, slots)
            self._address = str(_Address(header.place, self._device.uuid, handle))
            self._header = header
        return self._address

    def attach(self, address: str) -> "CudaIpcInlet | None":
        try:
            found = _Address.parse(address)
            header = found.header.map()
        except (OSError, ValueError):
            return None
        shape = None if header is None else ArenaShape.found_in(header, found.header.token)
        if header is None or shape is None or not self._device.reaches(found.uuid):
            return None
        try:
            # How much there is, only its owner can say.
            slots = self._device.map(found.handle, shape.slots_bytes)
        except OSError as error:
            # As in the process that it belongs to, or where a container keeps them apart.
            logger.warning("memory of GPU %s cannot be read from here: %s", found.uuid, error)
            return None
        is_own = found.uuid == self._device.uuid
        return CudaIpcInlet(ArenaInlet(header, slots, shape), slots, self._device, is_own)

    def close(self) -> None:
        """Let go of the arena. Its slots stay with this process, which a port ends with: what
        comes of a reader whose mapping is freed under it, CUDA does not say."""
        super().close()
        if self._header is not None:
            self._header.close()
            self._header = None


class CudaIpcInlet:
    """A consumer's view of an arena in a GPU: its own, or one that is read but once."""

    def __init__(
        self, arena: ArenaInlet, slots: torch.Tensor, device: Device, is_own_gpu: bool
    ) -> None:
        self._arena = arena
        self._slots: torch.Tensor | None = slots
        self._device = device
        self._is_own_gpu = is_own_gpu

    def door(self) -> str:
        return self._arena.door()

    def open(self, message: Blocks, frame: memoryview | None) -> Payload | None:
        payload = self._arena.open(message, frame)
        if payload is None or self._is_own_gpu or isinstance(payload.content, memoryview):
            return payload
        # Its checksum and the blocks are both computed from it: once over the link is enough.
        return Payload(self._device.fetch(payload.content), payload.is_intact)

    def close(self) -> None:
        self._arena.close()
        slots, self._slots = self._slots, None
        if slots is None:
            return
        try:
            self._device.unmap(slots)
        except OSError as error:
            logger.warning("a producer's memory stays mapped: %s", error)
