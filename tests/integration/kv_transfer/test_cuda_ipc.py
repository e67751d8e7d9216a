"""GPUs' memory shared between processes, with stand-ins: there is no GPU in these tests."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.stages import times_in
from kv_transfer.arena import PAGE_BYTES, ArenaShape
from kv_transfer.cuda_ipc import CudaIpcTransport
from kv_transfer.cuda_library import HANDLE_BYTES, CudaError, CudaLibrary
from kv_transfer.protocol import Via
from kv_transfer.shm import ShmTransport
from kv_transfer.transport import Transport
from tests.contract.handoff_sides import SECTION, Side, content, store_of
from tests.contract.host_device import HostDevice
from tests.waiting import wait_for

OK, NO_MEMORY, INVALID_CONTEXT = 0, 2, 201
HANDLE = bytes(range(HANDLE_BYTES))
OURS, THEIRS = 0x7F00_0000_1000, 0x7F00_0000_2000
SHAPE = ArenaShape(16 * PAGE_BYTES, 4)


class Cuda:
    """A runtime that notes `calls` and fails the one that is named."""

    def __init__(self, failing: str = "", code: int = OK) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._failing, self._code = failing, code
        functions: dict[str, Callable[..., object]] = {
            "cudaMalloc": lambda pointer, size: setattr(pointer._obj, "value", OURS),
            "cudaFree": lambda pointer: None,
            "cudaIpcGetMemHandle": lambda into, _: ctypes.memmove(into, HANDLE, HANDLE_BYTES),
            "cudaIpcOpenMemHandle": lambda into, *_: setattr(into._obj, "value", THEIRS),
            "cudaIpcCloseMemHandle": lambda pointer: None,
        }
        called = {name: self._called(name, act) for name, act in functions.items()}
        self.library = CudaLibrary(
            SimpleNamespace(
                **called,
                cudaGetErrorString=lambda code: f"error {code}".encode(),
                cudaGetLastError=lambda: self.calls.append(("cudaGetLastError", ())),
            )
        )

    def _called(self, name: str, act: Callable[..., object]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, tuple(map(_plain, arguments))))
            if name == self._failing:
                return self._code
            act(*arguments)
            return OK

        return call


def _plain(argument: Any) -> Any:
    if isinstance(argument, ctypes.Structure):
        return bytes(argument)
    return getattr(argument, "value", None if hasattr(argument, "_obj") else argument)


def test_what_is_asked_for_reaches_the_runtime() -> None:
    cuda = Cuda()
    assert cuda.library.allocate(99) == OURS
    assert cuda.library.handle_of(OURS) == HANDLE
    assert cuda.library.open(HANDLE) == THEIRS
    cuda.library.close(THEIRS)
    cuda.library.free(OURS)
    assert cuda.calls == [
        ("cudaMalloc", (None, 99)),
        ("cudaIpcGetMemHandle", (None, OURS)),
        ("cudaIpcOpenMemHandle", (None, HANDLE, 1)),
        ("cudaIpcCloseMemHandle", (THEIRS,)),
        ("cudaFree", (OURS,)),
    ]


@pytest.mark.parametrize(
    ("failing", "call"),
    [
        ("cudaMalloc", lambda library: library.allocate(1)),
        ("cudaIpcGetMemHandle", lambda library: library.handle_of(OURS)),
        ("cudaIpcOpenMemHandle", lambda library: library.open(HANDLE)),
        ("cudaIpcCloseMemHandle", lambda library: library.close(THEIRS)),
        ("cudaFree", lambda library: library.free(OURS)),
    ],
)
def test_errors_say_what_cuda_says_and_are_left_to_nobody_else(
    failing: str, call: Callable[[CudaLibrary], object]
) -> None:
    cuda = Cuda(failing, INVALID_CONTEXT)
    with pytest.raises(CudaError, match=f"{failing}: error 201"):
        call(cuda.library)
    assert cuda.calls[-1][0] == "cudaGetLastError"


class Pair:
    """Two ports, each with blocks of its own GPU; the consumer may have the producer's."""

    def __init__(self, theirs: HostDevice, ours: HostDevice, **changes: object) -> None:
        self.devices = theirs, ours
        section = SECTION.model_copy(update=changes)
        self.producer, self.consumer = (
            Side(section, seed, _transports(device), device="cpu")
            for seed, device in enumerate(self.devices)
        )

    def hand_over(self, name: str) -> str:
        """Return the way that the blocks went."""
        self.consumer.pull(self.producer.hold(name, range(1, 60)), range(200, 259))
        wait_for(self.consumer.has_ended(name))
        ended = self.consumer.pulls[name]
        assert ended.failure is None
        assert content(self.consumer.store, range(200, 259)) == content(store_of(0), range(1, 60))
        return ended.receipt.transport


def _transports(device: HostDevice) -> dict[Via, Transport]:
    return {Via.CUDA_IPC: CudaIpcTransport(SHAPE, device), Via.SHM: ShmTransport(SHAPE)}


@pytest.fixture
def pair_of() -> Iterator[Callable[..., Pair]]:
    """Make pairs; afterwards nobody has anything of another's mapped."""
    pairs: list[Pair] = []

    def make(theirs: HostDevice, ours: HostDevice, **changes: object) -> Pair:
        pairs.append(Pair(theirs, ours, **changes))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.consumer.port.close()
        pair.producer.port.close()
        assert [device.num_mapped for device in pair.devices] == [0, 0]


def test_another_gpus_chunks_are_read_once_and_ones_own_where_they_are(
    pair_of: Callable[..., Pair],
) -> None:
    far = pair_of(HostDevice("GPU-a"), HostDevice("GPU-b"))
    near = pair_of(HostDevice("GPU-a"), HostDevice("GPU-a"))
    assert {pair.hand_over("h") for pair in (far, near)} == {"cuda_ipc"}
    num_chunks = sum(times_in(far.producer.port.totals())["gather"].buckets)
    assert [far.devices[1].num_fetched, near.devices[1].num_fetched] == [num_chunks, 0]
    assert [pair.devices[1].num_mapped for pair in (far, near)] == [1, 1]


def test_gpus_that_do_not_reach_each_other_go_another_way(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of(HostDevice("GPU-a"), HostDevice("GPU-b", unreachable={"GPU-a"}))
    assert pair.hand_over("h") == "shm"
    assert pair.devices[1].num_mapped == 0


class Refusing(HostDevice):
    """A GPU whose memory cannot be handed out, or that maps nobody's."""

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        raise CudaError("cudaMalloc: out of memory")

    def map(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        raise CudaError("cudaIpcOpenMemHandle: invalid device context")


@pytest.mark.parametrize("is_producer", [True, False])
def test_what_cuda_does_not_do_is_done_another_way(
    pair_of: Callable[..., Pair], is_producer: bool
) -> None:
    devices = [HostDevice("GPU-a"), HostDevice("GPU-b")]
    devices[0 if is_producer else 1] = Refusing("GPU-c")
    assert pair_of(*devices).hand_over("h") == "shm"


def test_a_mapping_ends_with_its_link(pair_of: Callable[..., Pair]) -> None:
    """As where the producer's process is gone: its memory is held no longer than it is missed."""
    pair = pair_of(HostDevice("GPU-a"), HostDevice("GPU-b"), stall_timeout_s=0.3)
    assert pair.hand_over("h") == "cuda_ipc"
    assert pair.devices[1].num_mapped == 1
    pair.producer.port.close()
    pair.consumer.pull(pair.producer.offer("missed"), range(1, 9))
    wait_for(pair.consumer.has_ended("missed"))
    wait_for(lambda: pair.devices[1].num_mapped == 0)


def test_a_slot_written_again_while_it_is_fetched_fails_the_pull(
    pair_of: Callable[..., Pair],
) -> None:
    """Without checksums too: what was fetched may be half of each."""
    pair = pair_of(HostDevice("GPU-a"), HostDevice("GPU-b"), checksum=False)
    fetching, may_go_on = threading.Event(), threading.Event()

    class Slow(HostDevice):
        def fetch(self, memory: torch.Tensor) -> torch.Tensor:
            fetching.set()
            assert may_go_on.wait(10)
            return super().fetch(memory)

    slow = pair_of(pair.devices[0], Slow("GPU-b"), checksum=False)
    slow.consumer.pull(pair.producer.hold("h", range(1, 9)), range(1, 9))
    assert fetching.wait(5)
    pair.producer.port.abort(pair.producer.offer("h").handoff_id)
    wait_for(pair.producer.has_freed("h"))
    pair.hand_over("other")
    may_go_on.set()
    wait_for(slow.consumer.has_ended("h"))
    assert "took its memory back" in (slow.consumer.pulls["h"].failure or "")


def test_addresses_that_name_nothing_of_ours_are_not_mapped() -> None:
    device = HostDevice("GPU-a")
    here, elsewhere = CudaIpcTransport(SHAPE, device), ShmTransport(SHAPE)
    try:
        header, uuid, handle = here.address().rsplit("/", 2)
        boot, pid, fd, token = header.split("/")
        for address in (
            f"another-boot/{pid}/{fd}/{token}/{uuid}/{handle}",
            f"{boot}/{pid}/{fd}/{'00' * 16}/{uuid}/{handle}",
            f"{boot}/1/{fd}/{token}/{uuid}/{handle}",
            f"{boot}/{pid}/99999/{token}/{uuid}/{handle}",
            f"{header}/{uuid}/{handle[:-2]}",
            f"{header}/{uuid}/nothex",
            f"{header}/{uuid}/{b'/proc/none'.ljust(HANDLE_BYTES).hex()}",
            f"{header}/{handle}",
            elsewhere.address(),
            "",
        ):
            assert here.attach(address) is None, address
        assert device.num_mapped == 0
        inlet = here.attach(here.address())
        assert inlet is not None and device.num_mapped == 1
        inlet.close()
        inlet.close()
        assert device.num_mapped == 0
    finally:
        here.close()
        elsewhere.close()
