"""The hand-off port over plain host memory: what the simulated engine is given."""

from collections.abc import Mapping, Sequence

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId
from cluster.ring_file import KeySource
from kv_transfer.blocks import HostBlockStore
from kv_transfer.consumer import Pull
from kv_transfer.layout import BlockLayout
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from kv_transfer.progress import Growth


class HostHandoffPort:
    """One group of blocks in host memory behind a `HandoffPort`."""

    def __init__(
        self,
        layout: BlockLayout,
        num_blocks: int,
        section: HandoffSection,
        epoch: int,
        keys: KeySource | None = None,
    ) -> None:
        self._store = HostBlockStore(layout, num_blocks)
        self._port = HandoffPort(self._store, section, epoch, keys=keys)
        self.endpoints: tuple[str, ...] = (self._port.endpoint,)
        self.layout = layout.outline()

    def write(self, block_id: int, content: bytes) -> None:
        self._store.scatter(0, (block_id,), memoryview(content))

    def read(self, block_id: int) -> bytes:
        content = bytearray(self._store.layout.groups[0].block_bytes)
        self._store.gather(0, (block_id,), memoryview(content))
        return bytes(content)

    def open(self, key: str, handoff_id: HandoffId) -> None:
        self._port.open(handoff_id, key)

    def grow(self, handoff_id: HandoffId, block_ids: Sequence[int]) -> None:
        self._port.grow(Growth(handoff_id, (tuple(block_ids),)))

    def hold(
        self, key: str, handoff_id: HandoffId, block_ids: Sequence[int], first_token: int
    ) -> None:
        self._port.hold(Hold(handoff_id, key, (tuple(block_ids),), first_token))

    def abandon(self, key: str, handoff_id: HandoffId) -> None:
        self._port.abandon(handoff_id, key)

    def drop(self, handoff_id: HandoffId) -> None:
        self._port.abort(handoff_id)

    def pull(self, key: str, offer: Offer, block_ids: Sequence[int], awaits_token: bool) -> None:
        self._port.pull(Pull(key, offer, (tuple(block_ids),), (0,), awaits_token))

    def announce(self, offer: Offer) -> None:
        self._port.announce(offer)

    def give_up(self, offer: Offer) -> None:
        self._port.give_up(offer)

    def cancel(self, key: str) -> None:
        self._port.cancel(key)

    def take_freed(self) -> Sequence[str]:
        return self._port.take_freed()

    def take_pulls(self) -> Sequence[EndedPull]:
        return self._port.take_pulls()

    def totals(self) -> Mapping[str, int]:
        return self._port.totals()

    def close(self) -> None:
        self._port.close()
