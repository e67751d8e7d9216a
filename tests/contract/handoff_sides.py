"""Hand-off ports over blocks of odd sizes, for the contract of the transports."""

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import BlockStore
from kv_transfer.consumer import Pull
from kv_transfer.inproc import InprocTransport, Places
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from kv_transfer.protocol import Via
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import Transport
from kv_transfer.transports import arena_shape, transports_of
from tests.waiting import wait_for

# Odd sizes on purpose: nothing here is a multiple of a page, a line or a word.
LAYOUT = BlockLayout((GroupLayout(16, (1031, 77, 4099)), GroupLayout(32, (513,))), {"model": "m"})
NUM_BLOCKS = 600
BLOCK_BYTES = LAYOUT.groups[0].block_bytes
EPOCH = 42
# For those who are to notice a death; the others shall not, on however busy a machine.
STALL_S = 1.0
SECTION = HandoffSection(
    chunk_bytes=5 * BLOCK_BYTES, stall_timeout_s=10, lease_s=20, reads_in_flight=3
)
KINDS = ("inproc", "cma", "shm", "tcp", "gloo", "cuda_ipc")
ACROSS = ("cma", "shm", "tcp", "gloo", "cuda_ipc")
# Those whose producer copies blocks out before it announces them.
COPIED_OUT = ("inproc", "shm", "tcp", "gloo", "cuda_ipc")


def device_for(kinds: Iterable[str]) -> str | None:
    """Return where blocks are that go these ways: in arrays, or on the device of tensors."""
    return "cpu" if {"gloo", "cuda_ipc"}.intersection(kinds) else None


def store_of(seed: int, device: str | None = None) -> BlockStore:
    """Return blocks of random bytes in arrays, or in tensors on `device`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    regions = [
        [rng.integers(0, 256, (NUM_BLOCKS, size), np.uint8) for size in group.region_bytes]
        for group in LAYOUT.groups
    ]
    if device is None:
        return ArrayBlockStore(LAYOUT, regions)
    # Not by the processes that need none of it.
    import torch

    from kv_transfer.tensor_blocks import TensorBlockStore

    tensors = [[torch.from_numpy(region).to(device) for region in group] for group in regions]
    return TensorBlockStore(LAYOUT, tensors)


def content(store: BlockStore, block_ids: Sequence[int], group: int = 0) -> bytes:
    out = bytearray(len(block_ids) * LAYOUT.groups[group].block_bytes)
    store.gather(group, block_ids, memoryview(out))
    return bytes(out)


class Side:
    """A port over its own blocks, and what it has said."""

    def __init__(
        self,
        section: HandoffSection,
        seed: int,
        transports: Mapping[Via, Transport] | None = None,
        epoch: int = EPOCH,
        device: str | None = None,
        store: BlockStore | None = None,
    ) -> None:
        device = device or device_for(transports or section.transports)
        self.store, self.epoch = store or store_of(seed, device), epoch
        self.port = HandoffPort(self.store, section, epoch, transports=transports)
        self.freed: list[str] = []
        self.pulls: dict[str, EndedPull] = {}

    def hold(self, name: str, *groups: Sequence[int]) -> Offer:
        ids = tuple(tuple(group) for group in groups)
        self.port.hold(Hold(HandoffId(name), name, ids))
        return self.offer(name)

    def offer(self, name: str) -> Offer:
        endpoints = (self.port.endpoint,)
        worker, print_ = WorkerId("w"), LAYOUT.fingerprint
        return Offer(HandoffId(name), worker, self.epoch, print_, endpoints, 64, 4, 20.0)

    def pull(self, offer: Offer, *groups: Sequence[int]) -> None:
        ids = tuple(tuple(group) for group in groups)
        self.port.pull(Pull(offer.handoff_id, offer, ids, (0,) * len(ids)))

    def has_ended(self, *names: str) -> Callable[[], bool]:
        def check() -> bool:
            for ended in self.port.take_pulls():
                assert ended.key not in self.pulls, "a pull ended twice"
                self.pulls[ended.key] = ended
            return set(names) <= set(self.pulls)

        return check

    def has_freed(self, *names: str) -> Callable[[], bool]:
        def check() -> bool:
            self.freed += self.port.take_freed()
            return set(names) <= set(self.freed)

        return check


def _transport(kind: str, section: HandoffSection, store: BlockStore, places: Places) -> Transport:
    shape = arena_shape(section, store)
    if kind == "inproc":
        return InprocTransport(shape, places)
    if kind == "cuda_ipc":
        # Each has a GPU of its own, and these are none.
        from kv_transfer.cuda_ipc import CudaIpcTransport
        from tests.contract.host_device import HostDevice

        return CudaIpcTransport(shape, HostDevice(f"GPU-{os.urandom(4).hex()}"))
    named = section.model_copy(update={"transports": (kind,)})
    return transports_of(named, shape, store)[Via(kind)]


def side_over(
    kinds: Iterable[str],
    section: HandoffSection,
    seed: int,
    places: Places | None = None,
    epoch: int = EPOCH,
) -> Side:
    """Return a side that has just these ways, in this order."""
    kinds = tuple(kinds)
    store, found = store_of(seed, device_for(kinds)), {} if places is None else places
    transports = {Via(kind): _transport(kind, section, store, found) for kind in kinds}
    return Side(section, seed, transports, epoch, store=store)


Open = Callable[..., Side]


def arenas() -> int:
    """Return how many shared arenas this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text().count("/memfd:tandem-kv")
    fds = [os.path.realpath(fd.path) for fd in os.scandir("/proc/self/fd") if fd.is_symlink()]
    return maps + sum("/memfd:tandem-kv" in fd for fd in fds)


@pytest.fixture
def open_side() -> Iterator[Open]:
    """Open sides; afterwards close them and check that no memory, thread or file is left."""
    from kv_transfer.gloo import GlooBackend

    Side(SECTION, 0).port.close()
    # These start with the first of their kind and stay: ZeroMQ's thread that waits for frames
    # to be sent, what the store of an invitation hears signals by, and the process that looks
    # after others.
    TcpTransport(0).stage(1, "")
    GlooBackend("127.0.0.1", 1.0).invite()
    resource_tracker.ensure_running()
    gc.collect()
    before = psutil.Process().num_fds(), threading.active_count()
    in_dev_shm = set(os.listdir("/dev/shm"))
    sides: list[Side] = []
    places: Places = {}

    def open_side(*kinds: str, epoch: int = EPOCH, **changes: object) -> Side:
        section = SECTION.model_copy(update=changes)
        sides.append(side_over(kinds, section, len(sides), places, epoch))
        return sides[-1]

    yield open_side
    for side in sides:
        side.port.close()
    wait_for(lambda: psutil.Process().num_fds() <= before[0])
    assert threading.active_count() <= before[1]
    assert arenas() == 0
    assert not places
    left = {name for name in os.listdir("/dev/shm") if "tandem" in name} - in_dev_shm
    assert not left
