"""A producer and a consumer joined in memory, with a clock and a wire driven by hand."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.engine import EndedPull
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from kv_transfer.arena import PAGE_BYTES, ArenaShape
from kv_transfer.blocks import Content, HostBlockStore
from kv_transfer.consumer import Consumer, Damage, Order, Pull
from kv_transfer.inproc import InprocTransport
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.parcels import Parcels
from kv_transfer.producer import Answer, Hold, Producer
from kv_transfer.protocol import CODEC, Blocks, Place, ReadBlocks, Via
from kv_transfer.tcp import FrameInlet
from kv_transfer.transport import Stage

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

    def gather(self, group: int, block_ids: Sequence[int], into: memoryview) -> None:
        super().gather(group, block_ids, into)
        self.while_gathering()

    def scatter(self, group: int, block_ids: Sequence[int], payload: Content) -> None:
        self.scattered.append((group, tuple(block_ids)))
        super().scatter(group, block_ids, payload)

    def content(self, group: int, block_ids: Sequence[int]) -> bytes:
        content = bytearray(len(block_ids) * self.layout.groups[group].block_bytes)
        super().gather(group, block_ids, memoryview(content))
        return bytes(content)

    def overwrite(self, group: int, block_ids: Sequence[int], byte: int) -> None:
        size = len(block_ids) * self.layout.groups[group].block_bytes
        super().scatter(group, block_ids, memoryview(bytes([byte]) * size))


@dataclass(frozen=True, slots=True)
class Frame:
    """What is on its way to the consumer."""

    message: bytes
    payload: bytes | None


class FrameTransport:
    """Payloads that travel with their message, as over TCP; here as plain bytes."""

    via = Via.TCP

    def address(self) -> str:
        return ""

    def attach(self, address: str) -> FrameInlet:
        return FrameInlet()

    def can_carry(self, num_bytes: int, reader: str) -> bool:
        return num_bytes <= 1 << 20

    def stage(self, num_bytes: int, reader: str) -> Stage:
        buffer = memoryview(bytearray(num_bytes))
        return Stage(0, buffer, buffer)  # type: ignore[arg-type]

    def free(self, parcel: int) -> None:
        pass

    def close(self) -> None:
        pass


class Pair:
    """Every message crosses as bytes; `settle` delivers until nothing is on its way.

    With `num_slots` payloads go through an arena of that many, and as frames if it is full.
    """

    def __init__(
        self,
        layout: BlockLayout = LAYOUT,
        chunk_bytes: int = 64,
        window: int = 2,
        is_checksummed: bool = True,
        damage: Damage | None = None,
        seed: int = 0,
        num_slots: int = 0,
    ) -> None:
        self.now = 1000.0
        self.layout = layout
        self.theirs, self.ours = WatchedStore(layout, seed + 1), WatchedStore(layout, seed + 2)
        self.late_commands: list[Callable[[], None]] = []
        arena = InprocTransport(ArenaShape(PAGE_BYTES, max(1, num_slots)), places={})
        vias = (Via.INPROC, Via.TCP) if num_slots else (Via.TCP,)
        self.ways = tuple(Place(via, "") for via in vias)
        self.inlets = {Via.INPROC: arena.attach(arena.address()), Via.TCP: FrameInlet()}
        self.parcels = Parcels({Via.INPROC: arena, Via.TCP: FrameTransport()}, STALL_S)
        self.producer = Producer(
            self.theirs,
            EPOCH,
            LEASE_S,
            is_checksummed,
            self._catch_up,
            self.parcels,
        )
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
        awaits_token: bool = False,
    ) -> None:
        groups = tuple(tuple(ids) for ids in block_ids)
        first = tuple(first_blocks or [0] * len(groups))
        pull = Pull(key, offer or self.offer(), groups, first, awaits_token)
        self.send(self.consumer.start(pull, self.now))

    # The wire.

    def send(self, orders: Iterable[Order]) -> None:
        for order in orders:
            message = order.message
            if isinstance(message, ReadBlocks):
                message = replace(message, ways=self.ways)
            self.to_producer.append(CODEC.encode(message))

    def answer(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            frame: Any = answer.frame
            payload = None if frame is None else bytes(frame)
            self.to_consumer.append(Frame(CODEC.encode(answer.message), payload))

    def deliver_to_producer(self, frame: bytes) -> None:
        self.answer(self.producer.handle(b"consumer", CODEC.decode(frame), self.now))

    def deliver_to_consumer(self, frame: Frame) -> None:
        message, payload = CODEC.decode(frame.message), None
        if isinstance(message, Blocks) and (inlet := self.inlets[message.via]) is not None:
            content = None if frame.payload is None else memoryview(frame.payload)
            payload = inlet.open(message, content)
        self.send(self.consumer.handle(message, payload, self.now))

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
            repr(self.producer) == "<Producer held=0 parked=0 out=0>"
        )


def assert_untouched(pair: Pair) -> None:
    assert pair.ours.scattered == []


def assert_failed(pair: Pair, reason: str) -> None:
    assert pair.result.failure is not None and reason in pair.result.failure
    assert pair.consumer.counts["pulls_failed"] == 1
