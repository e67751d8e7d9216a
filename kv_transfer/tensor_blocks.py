"""Blocks in tensors: gathered and scattered on their device, through pinned memory to the host."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from kv_transfer.blocks import Content, Elsewhere, Memory, host_bytes, host_checksum
from kv_transfer.layout import BlockLayout

_WORDS = (torch.int64, torch.int32, torch.int16)
_WORD_BYTES = 8
_MASK = (1 << 64) - 1
# Of splitmix64, as torch has them: signed.
_STEP, _MIX_1, _MIX_2 = (
    constant - (1 << 64)
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class TensorBlockStore:
    """Byte matrices [num_blocks, bytes] of one device, by group and region.

    One operation per region moves all blocks of a chunk, in the widest words that they consist
    of. On a GPU they are ordered among the port's alone, behind what `follow` has marked: the
    engine's steps and the copies do not wait for each other otherwise.
    """

    def __init__(self, layout: BlockLayout, regions: Sequence[Sequence[torch.Tensor]]) -> None:
        self.layout = layout
        self.total_bytes = sum(region.nbytes for group in regions for region in group)
        self._regions = regions
        self._device = regions[0][0].device
        self.device: str | None = str(self._device)
        self._is_on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._is_on_gpu else None
        self._followed: torch.cuda.Event | None = None
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def follow(self) -> None:
        """Copies from here on wait for what the calling thread has given the GPU to do so far."""
        if self._is_on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._followed = event

    def gather(self, group: int, block_ids: Sequence[int], into: Memory) -> None:
        if not isinstance(into, memoryview):
            with self._ordered():
                self._select(group, block_ids, into)
            return
        host = self._host(into.nbytes)
        with self._ordered():
            if self._is_on_gpu:
                chunk = torch.empty(into.nbytes, dtype=torch.uint8, device=self._device)
                self._select(group, block_ids, chunk)
                host.copy_(chunk, non_blocking=True)
            else:
                self._select(group, block_ids, host)
        np.copyto(np.frombuffer(into, np.uint8), host.numpy())

    def scatter(self, group: int, block_ids: Sequence[int], payload: Content) -> None:
        if isinstance(payload, Elsewhere):
            payload = payload.fetch()
        if isinstance(payload, memoryview):
            host = self._host(payload.nbytes)
            np.copyto(host.numpy(), np.frombuffer(payload, np.uint8))
        with self._ordered():
            chunk = host if isinstance(payload, memoryview) else payload
            on_device = chunk.to(self._device, non_blocking=True)
            rows = torch.tensor(block_ids, device=self._device)
            for region, part in self._parts(group, len(block_ids), on_device):
                region.index_copy_(0, rows, part)

    def checksum(self, payload: Content) -> int:
        if isinstance(payload, memoryview | Elsewhere):
            return host_checksum(host_bytes(payload))
        with self._ordered():
            return _checksum(payload)

    def regions(self) -> None:
        return None

    def _select(self, group: int, block_ids: Sequence[int], into: torch.Tensor) -> None:
        rows = torch.tensor(block_ids, device=self._device)
        for region, part in self._parts(group, len(block_ids), into):
            torch.index_select(region, 0, rows, out=part)

    def _parts(
        self, group: int, num_rows: int, chunk: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each region with its part of `chunk`, both as words of the same width."""
        offset = 0
        for region, size in zip(
            self._regions[group], self.layout.groups[group].region_bytes, strict=True
        ):
            part = chunk[offset : offset + num_rows * size].view(num_rows, size)
            # The strides of rows, and where both begin.
            places = (size, region.stride(0), region.storage_offset(), part.storage_offset())
            for word in _WORDS:
                if not any(place % word.itemsize for place in places):
                    region, part = region.view(word), part.view(word)
                    break
            yield region, part
            offset += num_rows * size

    def _host(self, num_bytes: int) -> torch.Tensor:
        """Return host memory that the device copies from and to without a detour."""
        if self._pinned.nbytes < num_bytes:
            self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_on_gpu)
        return self._pinned[:num_bytes]

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """Do what is inside behind what `follow` marked, and have it done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._followed is not None:
                self._stream.wait_event(self._followed)
            yield
        self._stream.synchronize()


def _checksum(payload: torch.Tensor) -> int:
    """Return 64 bits of every word and its place, computed where the payload is.

    Each word is mixed with its place before it is added up (splitmix64), so neither swapped nor
    equal words cancel each other out.
    """
    num_words = payload.nbytes // _WORD_BYTES
    body = payload[: num_words * _WORD_BYTES].view(torch.int64)
    tail = payload.new_zeros(_WORD_BYTES)
    tail[: payload.nbytes % _WORD_BYTES] = payload[num_words * _WORD_BYTES :]
    words = torch.cat((body, tail.view(torch.int64)))
    words += torch.arange(1, num_words + 2, device=payload.device).mul_(_STEP)
    words = _shifted(words, 30).bitwise_xor_(words).mul_(_MIX_1)
    words = _shifted(words, 27).bitwise_xor_(words).mul_(_MIX_2)
    total = int(words.sum().item()) + int(payload.nbytes)
    return total & _MASK


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right as if unsigned: a sign that is shifted in would cancel itself out."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
