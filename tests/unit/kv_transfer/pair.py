"""A producer and a consumer joined in memory, with a clock and a wire driven by hand."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from kv_transfer.blocks import HostBlockStore
from kv_transfer.consumer import Consumer, Damage, Order, Pull
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.producer import Answer, Hold, Producer
from kv_transfer.protocol import CODEC, Blocks

LEASE_S, STALL_S = 30.0, 3.0
EPOCH = 7
ENDPOINT = "tcp://producer"
NUM_BLOCKS = 64
LAYOUT = BlockLayout((GroupLayout(16, (8, 24)),), {"model": "m"})
TWO_GROUPS = BlockLayout((GroupLayout(16, (8, 24)), GroupLayout(32, (40,))), {"model": "m"})


class WatchedStore(HostBlockStore):
    """Remembers which blocks were written, and lets a test act while blocks are gathered."""

    def __init__(self, layout: BlockLayout, seed: int) -> None:
        super().__init__(layout, NUM_BLOCKS)
        rng = random.Random(seed)
        for group, facts in enumerate(layout.groups):
            ids = range(NUM_BLOCKS)
            content = rng.randbytes(NUM_BLOCKS * facts.block_bytes)
            super().scatter(group, ids, memoryview(content))
        self.scattered: list[tuple[int, tuple[int, ...]]] = []
        self.while_gathering: Callable[[], None] = lambda: None

    def gather(self, group: int, block_ids: Sequence[int]) -> memoryview:
        payload = super().gather(group, block_ids)
        self.while_gathering()
        return payload

    def scatter(self, group: int, block_ids: Sequence[int], payload: memoryview) -> None:
        self.scattered.append((group, tuple(block_ids)))
        super().scatter(group, block_ids, payload)

    def content(self, group: int, block_ids: Sequence[int]) -> bytes:
        return bytes(super().gather(group, block_ids))

    def overwrite(self, group: int, block_ids: Sequence[int], byte: int) -> None:
        size = len(block_ids) * self.layout.groups[group].block_bytes
        super().scatter(group, block_ids, memoryview(bytes([byte]) * size))


@dataclass(frozen=True, slots=True)
class Frame:
    """What is on its way to the consumer."""

    message: bytes
    payload: bytes | None


class Pair:
    """Every message crosses as bytes; `settle` delivers until nothing is on its way."""

    def __init__(
        self,
        layout: BlockLayout = LAYOUT,
        chunk_bytes: int = 64,
        window: int = 2,
        is_checksummed: bool = True,
        damage: Damage | None = None,
        seed: int = 0,
    ) -> None:
        self.now = 1000.0
        self.layout = layout
        self.theirs, self.ours = WatchedStore(layout, seed + 1), WatchedStore(layout, seed + 2)
        self.late_commands: list[Callable[[], None]] = []
        self.producer = Producer(self.theirs, EPOCH, LEASE_S, is_checksummed, self._catch_up)
        self.consumer = Consumer(
            self.ours, 0, chunk_bytes, window, STALL_S, LEASE_S / 3, is_checksummed, damage
        )
        self.to_producer: deque[bytes] = deque()
        self.to_consumer: deque[Frame] = deque()
        self.num_reads = 0

    def _catch_up(self) -> None:
        while self.late_commands:
            self.late_commands.pop(0)()

    # What engines do.

    def offer(self, name: str = "h", num_blocks: int = 4, **changes: object) -> Offer:
        fields: dict[str, object] = {
            "handoff_id": HandoffId(name),
            "worker_id": WorkerId("w"),
            "epoch": EPOCH,
            "fingerprint": self.layout.fingerprint,
            "endpoints": (ENDPOINT,),
            "num_tokens": num_blocks * 16,
            "num_blocks": num_blocks,
            "lease_s": LEASE_S,
        }
        return Offer(**{**fields, **changes})  # type: ignore[arg-type]

    def hold(self, *block_ids: Sequence[int], name: str = "h", key: str | None = None) -> None:
        groups = tuple(tuple(ids) for ids in block_ids)
        self.producer.hold(Hold(HandoffId(name), key or f"key-{name}", groups), self.now)

    def pull(
        self,
        *block_ids: Sequence[int],
        offer: Offer | None = None,
        key: str = "pull",
        first_blocks: Sequence[int] | None = None,
    ) -> None:
        groups = tuple(tuple(ids) for ids in block_ids)
        first = tuple(first_blocks or [0] * len(groups))
        self.send(self.consumer.start(Pull(key, offer or self.offer(), groups, first), self.now))

    # The wire.

    def send(self, orders: Iterable[Order]) -> None:
        self.to_producer += [CODEC.encode(order.message) for order in orders]

    def answer(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            payload = None if answer.payload is None else bytes(answer.payload)
            self.to_consumer.append(Frame(CODEC.encode(answer.message), payload))

    def deliver_to_producer(self, frame: bytes) -> None:
        self.answer(self.producer.handle(b"consumer", CODEC.decode(frame), self.now))

    def deliver_to_consumer(self, frame: Frame) -> None:
        payload = None if frame.payload is None else memoryview(frame.payload)
        self.send(self.consumer.handle(CODEC.decode(frame.message), payload, self.now))

    def tick(self, dt: float = 0.0) -> None:
        self.now += dt
        self.answer(self.producer.tick(self.now))
        self.send(self.consumer.tick(self.now))

    def settle(self) -> None:
        while self.to_producer or self.to_consumer:
            while self.to_producer:
                self.deliver_to_producer(self.to_producer.popleft())
            while self.to_consumer:
                self.deliver_to_consumer(self.to_consumer.popleft())

    def next_blocks(self) -> tuple[Blocks, bytes]:
        """Take the next frame off the wire to the consumer; it must carry blocks."""
        frame = self.to_consumer.popleft()
        message = CODEC.decode(frame.message)
        assert isinstance(message, Blocks) and frame.payload is not None
        return message, frame.payload

    # What is left.

    @property
    def result(self) -> EndedPull:
        (result,) = self.consumer.results
        return result

    def is_idle(self) -> bool:
        return repr(self.consumer) == "<Consumer pulling=0 announced=0>" and (
            repr(self.producer) == "<Producer held=0 parked=0>"
        )


def assert_untouched(pair: Pair) -> None:
    assert pair.ours.scattered == []


def assert_failed(pair: Pair, reason: str) -> None:
    assert pair.result.failure is not None and reason in pair.result.failure
    assert pair.consumer.counts["pulls_failed"] == 1
