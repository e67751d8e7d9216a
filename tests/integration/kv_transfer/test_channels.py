"""Channels over a backend of queues: what breaks one, who notices, and what is given back."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from kv_transfer.arena import PAGE_BYTES, ArenaShape
from kv_transfer.channels import ChannelBroken, ChannelInlet, ChannelTransport
from kv_transfer.protocol import Via
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import Payload, Stage, Transport
from tests.contract.handoff_sides import SECTION, Side, content, store_of
from tests.kv_messages import announced
from tests.waiting import wait_for

SHAPE = ArenaShape(PAGE_BYTES, 2)
Wire = queue.SimpleQueue[torch.Tensor | None]


class QueueChannel:
    """What is sent is copied into the wire; `None` there says that the other end is closed."""

    def __init__(self, wires: "Wires", out: Wire, into: Wire) -> None:
        self._wires, self._out, self._into = wires, out, into

    def send(self, memory: torch.Tensor) -> None:
        assert self._wires.may_send.wait(10)
        if self._wires.is_cut:
            raise ChannelBroken("cut")
        self._out.put(memory.clone())

    def receive(self, memory: torch.Tensor) -> None:
        found = self._into.get(timeout=10)
        if found is None:
            raise ChannelBroken("the other end is gone")
        memory.copy_(found)

    def abort(self) -> None:
        for wire in (self._out, self._into):
            wire.put(None)


class QueueInvitation:
    def __init__(self, wires: "Wires") -> None:
        self._wires, self._pair = wires, (Wire(), Wire())
        self.address = f"wire-{len(wires.invited)}"
        wires.invited[self.address] = self._pair

    def accept(self) -> QueueChannel:
        return QueueChannel(self._wires, *self._pair)


class Wires:
    """Stands for the network; `may_send` holds sends up, `is_cut` fails them."""

    via = Via.GLOO
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.invited: dict[str, tuple[Wire, Wire]] = {}
        self.may_send = threading.Event()
        self.may_send.set()
        self.is_cut = False

    def invite(self) -> QueueInvitation:
        return QueueInvitation(self)

    def join(self, address: str) -> QueueChannel:
        if address not in self.invited:
            raise ChannelBroken(f"nobody is at {address}")
        out, into = self.invited[address]
        return QueueChannel(self, into, out)

    def ordered(self) -> AbstractContextManager[object]:
        return nullcontext()


class Ends:
    """A producer's transport, a reader's, and the reader's inlet."""

    def __init__(self, idle_s: float = 60.0) -> None:
        self.wires = Wires()
        self.producer = ChannelTransport(self.wires, SHAPE, idle_s)
        self.reader = ChannelTransport(self.wires, SHAPE, idle_s)
        inlet = self.reader.attach(self.producer.address())
        assert inlet is not None
        self.inlet: ChannelInlet = inlet

    def door(self) -> str:
        door = self.inlet.door()
        assert door is not None
        return door

    def stage(self, text: bytes, door: str | None = None) -> Stage | None:
        stage = self.producer.stage(len(text), door or self.door())
        if stage is not None:
            stage.buffer[:] = torch.tensor(list(text), dtype=torch.uint8)
        return stage

    def open(self, parcel: int, num_bytes: int) -> Future[Payload]:
        payload = self.inlet.open(announced(parcel, num_bytes), None)
        assert payload is not None
        return payload


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    before = threading.active_count()
    yield made
    made.wires.may_send.set()
    made.producer.close()
    made.reader.close()
    assert threading.active_count() < before


def has_sent(ends: Ends, door: str) -> bool:
    """Send something to `door`, if there is room."""
    stage = ends.stage(b"x", door)
    if stage is not None:
        stage.send()
        ends.producer.free(stage.parcel)
    return stage is not None


def text_of(payload: Future[Payload]) -> bytes:
    memory: Any = payload.result(5).content
    return bytes(memory.tolist())


def test_chunks_come_in_the_order_in_which_they_are_announced(ends: Ends) -> None:
    first, second = ends.stage(b"first"), ends.stage(b"second")
    assert first is not None and second is not None and ends.stage(b"third") is None
    for stage in (second, first):
        stage.send()
    assert text_of(ends.open(second.parcel, 6)) == b"second"
    assert text_of(ends.open(first.parcel, 5)) == b"first"


def test_a_slot_is_free_when_it_is_sent_and_taken_whichever_is_last(ends: Ends) -> None:
    ends.wires.may_send.clear()
    sent, dropped = ends.stage(b"a"), ends.stage(b"b")
    assert sent is not None and dropped is not None
    sent.send()
    ends.producer.free(sent.parcel)
    ends.producer.free(dropped.parcel)
    again = ends.stage(b"c")
    assert again is not None and ends.stage(b"d") is None, "it is being sent"
    ends.wires.may_send.set()
    wait_for(lambda: ends.stage(b"d") is not None)
    ends.producer.free(12345)
    assert ends.stage(b"e") is None


def test_another_chunk_than_announced_breaks_the_channel(ends: Ends) -> None:
    """As where a message is lost between them: no chunk is ever taken for another."""
    first, second = ends.stage(b"first"), ends.stage(b"other")
    assert first is not None and second is not None
    first.send()
    second.send()
    wrong, after = ends.open(second.parcel, 5), ends.open(first.parcel, 5)
    for payload in (wrong, after):
        with pytest.raises(ChannelBroken, match="came where"):
            payload.result(5)
    assert ends.inlet.door() is None
    with pytest.raises(ChannelBroken, match="came where"):
        ends.open(1, 5).result(5)


def test_what_no_chunk_can_be_is_not_received(ends: Ends) -> None:
    for num_bytes in (0, -1, SHAPE.slot_bytes + 1, 1 << 60):
        assert ends.inlet.open(announced(1, num_bytes), None) is None
    assert ends.inlet.open(announced(1, 5), memoryview(b"frame")) is None
    assert not ends.producer.can_carry(SHAPE.slot_bytes + 1, ends.door())
    assert not ends.producer.can_carry(8, "")


def test_a_reader_that_is_not_there_ends_its_sends_and_no_others(ends: Ends) -> None:
    lost = ends.stage(b"lost", door="nowhere")
    assert lost is not None
    lost.send()
    wait_for(lambda: not ends.producer.can_carry(8, "nowhere"))
    ends.producer.free(lost.parcel)
    first, second = ends.stage(b"1"), ends.stage(b"2")
    assert first is not None and second is not None
    second.send()
    assert text_of(ends.open(second.parcel, 1)) == b"2"


def test_readers_are_bounded(ends: Ends) -> None:
    for _ in range(64):
        door = ends.wires.invite().address
        wait_for(partial(has_sent, ends, door))
    assert not ends.producer.can_carry(8, ends.door())


def test_closing_ends_what_is_waited_for() -> None:
    ends = Ends()
    payload = ends.open(1, 5)
    ends.inlet.close()
    with pytest.raises(ChannelBroken, match="gloo: closed"):
        payload.result(5)
    with pytest.raises(ChannelBroken, match="gloo: closed"):
        ends.open(2, 5).result(5)
    ends.producer.close()
    ends.reader.close()


def test_idle_channels_end_and_their_readers_invite_anew() -> None:
    ends = Ends(idle_s=0.05)
    old = ends.door()
    first = ends.stage(b"first", old)
    assert first is not None
    first.send()
    assert text_of(ends.open(first.parcel, 5)) == b"first"
    wait_for(lambda: not ends.producer.can_carry(8, old))
    new = ends.door()
    assert new != old and ends.producer.can_carry(8, new)
    ends.producer.free(first.parcel)
    second = ends.stage(b"second", new)
    assert second is not None
    second.send()
    assert text_of(ends.open(second.parcel, 6)) == b"second"
    ends.producer.close()
    ends.reader.close()


def transports(wires: Wires, has_tcp: bool) -> dict[Via, Transport]:
    channels = ChannelTransport(wires, ArenaShape(1 << 16, 4))
    return {Via.GLOO: channels, **({Via.TCP: TcpTransport(4)} if has_tcp else {})}


@pytest.mark.parametrize(("has_tcp", "next_way"), [(True, "tcp"), (False, "gloo")])
def test_a_pair_whose_channel_breaks_goes_another_way_or_meets_anew(
    has_tcp: bool, next_way: str
) -> None:
    wires = Wires()
    sides = [Side(SECTION, seed, transports(wires, has_tcp)) for seed in (1, 2)]
    producer, consumer = sides
    try:
        for name, transport in (("before", "gloo"), ("cut", None), ("after", next_way)):
            wires.is_cut = name == "cut"
            consumer.pull(producer.hold(name, range(1, 9)), range(1, 9))
            wait_for(consumer.has_ended(name))
            ended = consumer.pulls[name]
            if transport is None:
                # Of two chunks: the first was lost on the channel, or the second found it broken.
                assert "transport: " in (ended.failure or "")
            else:
                assert (ended.failure, ended.receipt.transport) == (None, transport)
        wait_for(producer.has_freed("before", "cut", "after"))
        assert content(consumer.store, range(1, 9)) == content(store_of(1), range(1, 9))
    finally:
        for side in sides:
            side.port.close()
