"""A hand-off port with its store, and what it has said, for the tests of this folder."""

import gc
import random
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest
import zmq

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from cluster.ring_file import KeySource
from kv_transfer.blocks import HostBlockStore
from kv_transfer.consumer import Pull
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from tests.waiting import wait_for

LAYOUT = BlockLayout((GroupLayout(16, (1024, 3072)),), {"model": "m"})
NUM_BLOCKS = 512
EPOCH = 42
SECTION = HandoffSection(chunk_bytes=8192, stall_timeout_s=0.5, lease_s=20, reads_in_flight=2)


class Side:
    """A port, its store, and everything it has said was freed or pulled."""

    def __init__(self, section: HandoffSection, seed: int, keys: KeySource | None = None) -> None:
        self.store = HostBlockStore(LAYOUT, NUM_BLOCKS)
        content = random.Random(seed).randbytes(NUM_BLOCKS * 4096)
        self.store.scatter(0, range(NUM_BLOCKS), memoryview(content))
        self.port = HandoffPort(self.store, section, EPOCH, keys=keys)
        self.freed: list[str] = []
        self.pulls: dict[str, EndedPull] = {}

    def poll(self) -> None:
        self.freed += self.port.take_freed()
        for ended in self.port.take_pulls():
            assert ended.key not in self.pulls, "a pull ended twice"
            self.pulls[ended.key] = ended

    def has_freed(self, *keys: str) -> Callable[[], bool]:
        def check() -> bool:
            self.poll()
            return set(keys) <= set(self.freed)

        return check

    def has_ended(self, *keys: str) -> Callable[[], bool]:
        def check() -> bool:
            self.poll()
            return set(keys) <= set(self.pulls)

        return check

    def content(self, *block_ids: int) -> bytes:
        content = bytearray(len(block_ids) * 4096)
        self.store.gather(0, block_ids, memoryview(content))
        return bytes(content)

    def offer(self, name: str) -> Offer:
        endpoints = (self.port.endpoint,)
        return Offer(
            HandoffId(name), WorkerId("w"), EPOCH, LAYOUT.fingerprint, endpoints, 64, 4, 20.0
        )

    def hold(self, name: str, *block_ids: int) -> Offer:
        self.port.hold(Hold(HandoffId(name), name, (block_ids,)))
        return self.offer(name)

    def pull(self, offer: Offer, *block_ids: int) -> None:
        self.port.pull(Pull(offer.handoff_id, offer, (block_ids,), (0,)))


Open = Callable[..., Side]


@pytest.fixture
def open_side() -> Iterator[Open]:
    """Open sides; afterwards close them all and check that nothing is left."""
    Side(SECTION, 0).port.close()
    # pyzmq opens a context of its own with the first frame that is sent from where it lies.
    zmq.Frame(b"x", track=True, copy=False, copy_threshold=0)
    gc.collect()
    num_fds, num_threads = psutil.Process().num_fds(), threading.active_count()
    sides: list[Side] = []

    def open_side(keys: KeySource | None = None, **changes: object) -> Side:
        sides.append(Side(SECTION.model_copy(update=changes), len(sides), keys))
        return sides[-1]

    yield open_side
    for side in sides:
        side.port.close()
        side.port.close()
    wait_for(lambda: psutil.Process().num_fds() <= num_fds)
    assert threading.active_count() == num_threads
