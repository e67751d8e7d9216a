"""The request plane over real sockets: bad frames, silence, legs."""

import asyncio
from collections.abc import AsyncIterator

import msgpack
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from cluster.errors import DeadlineExceeded, HandoffFailed, WorkerLost
from cluster.messages import CODEC, PROTOCOL_VERSION, Decode, Heartbeat, Prefill, Prefilled, Tokens
from cluster.metrics import REGISTRIES
from cluster.names import (
    Component,
    FinishReason,
    HandoffId,
    RequestId,
    Role,
    RouterId,
    WorkerId,
)
from cluster.request_plane import MAX_REQUEST_BYTES, Leg, WorkerLink
from cluster.sockets import Sockets
from tests.integration.fake_worker import FakeWorker, Plan
from tests.waiting import until

TIMEOUT_S = 0.6
BAD_FRAMES = [
    b"",
    b"\x00" * 40,
    b"\x93\x01",
    msgpack.packb([PROTOCOL_VERSION + 1, 1, ["r"]]),
    msgpack.packb([PROTOCOL_VERSION, 250, []]),
    msgpack.packb([PROTOCOL_VERSION, 4, [7]]),
]


def malformed(plane: str) -> float:
    registry = REGISTRIES[Component.EVERY]
    return registry.get_sample_value("tandem_malformed_frames_total", {"plane": plane}) or 0.0


@pytest_asyncio.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


class Pair:
    """A worker and a link to it."""

    def __init__(self, context: zmq.asyncio.Context, role: Role = Role.DECODE) -> None:
        self.num_changes = 0
        self.worker = FakeWorker(Sockets(context), WorkerId("w0"), role)
        self.link = WorkerLink(
            Sockets(context),
            RouterId("router"),
            self.worker.worker_id,
            self.worker.socket.endpoint,
            TIMEOUT_S,
            self._count,
        )

    def _count(self) -> None:
        self.num_changes += 1

    def decode(self, name: str = "r") -> Leg:
        return self.link.open(Decode(RequestId(name), (1, 2), {}, None, None, 0))

    async def settle(self) -> None:
        """Return when what the worker has sent so far has been delivered."""
        with self.decode("settle") as leg:
            await leg.receive()
            await leg.receive()

    def prefill(self, name: str = "r") -> Leg:
        return self.link.open(Prefill(RequestId(name), HandoffId("h"), (1, 2), None, 0))


@pytest_asyncio.fixture
async def pair(context: zmq.asyncio.Context) -> AsyncIterator[Pair]:
    pair = Pair(context)
    yield pair
    await pair.link.close()
    await pair.worker.die()


async def test_a_leg_carries_tokens_in_order_until_the_last(pair: Pair) -> None:
    with pair.decode() as leg:
        answers = [await leg.receive() for _ in range(2)]
    assert all(isinstance(answer, Tokens) for answer in answers)
    assert [answer.token_ids for answer in answers if isinstance(answer, Tokens)] == [(0,), (1,)]
    # An ended leg is not cancelled; what is sent after it arrives.
    pair.worker.default = Plan("hang", 0)
    pair.decode("next").close()
    await until(lambda: pair.worker.cancelled)
    assert pair.worker.cancelled == ["next"] and pair.link.num_legs == 0


async def test_two_legs_of_one_name_are_refused(pair: Pair) -> None:
    with pair.decode() as leg, pytest.raises(ValueError, match="already has a leg"):
        pair.decode()
    assert leg.request_id == "r" and pair.link.num_legs == 0


async def test_a_worker_drops_and_counts_malformed_frames(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    before = malformed("request")
    with context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(pair.worker.socket.endpoint)
        await stranger.send_multipart([*BAD_FRAMES, CODEC.encode(Heartbeat(RouterId("s"), 0))])
        # The good frame among the bad ones is answered.
        async with asyncio.timeout(10):
            await stranger.recv()
    assert malformed("request") - before == len(BAD_FRAMES)
    with pair.decode() as leg:
        await leg.receive()


async def test_a_frame_beyond_a_requests_size_ends_its_connection_and_no_other(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    with context.socket(zmq.DEALER) as stranger, stranger.get_monitor_socket() as events:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(pair.worker.socket.endpoint)
        await stranger.send(bytes(MAX_REQUEST_BYTES + 1))
        async with asyncio.timeout(10):
            while (await recv_monitor_message(events))["event"] != zmq.EVENT_DISCONNECTED:
                pass
        stranger.disable_monitor()
    with pair.decode() as leg:
        await leg.receive()


async def test_a_message_for_the_other_side_is_ignored(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    with context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(pair.worker.socket.endpoint)
        tokens = CODEC.encode(Tokens(RequestId("r"), (1,)))
        await stranger.send_multipart([tokens, CODEC.encode(Heartbeat(RouterId("s"), 0))])
        async with asyncio.timeout(10):
            await stranger.recv()
    assert pair.worker.requests == []


async def test_a_router_drops_and_counts_malformed_frames(context: zmq.asyncio.Context) -> None:
    before = malformed("token")
    with context.socket(zmq.ROUTER) as worker:
        worker.setsockopt(zmq.LINGER, 0)
        port = worker.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        link = WorkerLink(Sockets(context), RouterId("router"), WorkerId("w"), endpoint, TIMEOUT_S)
        with link.open(Decode(RequestId("r"), (1,), {}, None, None, 0)) as leg:
            await worker.recv_multipart()
            foreign = Tokens(RequestId("someone else's"), (9,))
            own = Tokens(RequestId("r"), (1,), FinishReason.STOP)
            frames = [b"router", *BAD_FRAMES, CODEC.encode(foreign), CODEC.encode(own)]
            await worker.send_multipart(frames)
            assert await leg.receive() == own
        await link.close()
    assert malformed("token") - before == len(BAD_FRAMES)


async def test_a_stranger_with_delimiter_frames_does_no_harm(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    with context.socket(zmq.REQ) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(pair.worker.socket.endpoint)
        await stranger.send(CODEC.encode(Heartbeat(RouterId("s"), 0)))
    with pair.decode() as leg:
        await leg.receive()


async def test_heartbeats_are_answered_with_snapshots(pair: Pair) -> None:
    await until(lambda: pair.worker.num_heartbeats >= 4)
    await until(lambda: pair.link.snapshot is not None)
    assert pair.link.snapshot is not None and pair.link.snapshot.worker_id == "w0"
    assert not pair.link.is_lost
    # Only the first answer is a change.
    assert pair.num_changes == 1


async def test_a_silent_worker_is_lost_and_its_legs_are_told(pair: Pair) -> None:
    await until(lambda: pair.link.snapshot)
    pair.worker.default = Plan("hang", 0)
    leg = pair.decode()
    pair.worker.freeze()
    async with asyncio.timeout(TIMEOUT_S + 3):
        with pytest.raises(WorkerLost, match="w0: silent"):
            await leg.receive()
    leg.close()
    assert pair.link.is_lost and pair.num_changes == 2
    with pytest.raises(WorkerLost):
        pair.decode("other")


async def test_a_worker_that_never_answers_is_lost_too(context: zmq.asyncio.Context) -> None:
    sockets, endpoint = Sockets(context), "tcp://127.0.0.1:9"
    link = WorkerLink(sockets, RouterId("r"), WorkerId("w"), endpoint, TIMEOUT_S)
    await until(lambda: link.is_lost)
    assert link.snapshot is None
    await link.close()


async def test_a_worker_that_answers_again_is_back_and_learns_what_was_cancelled(
    pair: Pair,
) -> None:
    pair.worker.default = Plan("hang", 0)
    leg = pair.decode()
    await until(lambda: pair.worker.requests)
    pair.worker.freeze()
    with pytest.raises(WorkerLost):
        await leg.receive()
    leg.close()
    pair.worker.thaw()
    await until(lambda: not pair.link.is_lost)
    await until(lambda: pair.worker.cancelled == ["r"])
    pair.worker.default = Plan()
    with pair.decode("after") as after:
        await after.receive()


async def test_steady_traffic_counts_as_life(pair: Pair) -> None:
    pair.worker.default = Plan("finish", num_tokens=20, delay_s=TIMEOUT_S / 10)
    with pair.decode() as leg:
        for _ in range(20):
            await leg.receive()
    assert not pair.link.is_lost


async def test_closing_the_link_ends_open_legs(pair: Pair) -> None:
    pair.worker.default = Plan("hang", 0)
    leg = pair.decode()
    waiting = asyncio.create_task(leg.receive())
    await until(lambda: pair.worker.requests)
    await pair.link.close()
    with pytest.raises(WorkerLost, match="link closed"):
        await waiting
    leg.close()


async def test_cancelling_a_receive_loses_no_message(pair: Pair) -> None:
    pair.worker.gate.clear()
    with pair.decode() as leg:
        waiting = asyncio.create_task(leg.receive())
        await until(lambda: pair.worker.requests)
        waiting.cancel()
        pair.worker.gate.set()
        await asyncio.gather(waiting, return_exceptions=True)
        first, second = await leg.receive(), await leg.receive()
    assert isinstance(first, Tokens) and isinstance(second, Tokens)
    assert (first.token_ids, second.token_ids) == ((0,), (1,))


async def test_failing_a_leg_comes_before_what_has_arrived(pair: Pair) -> None:
    pair.worker.default = Plan("hang", num_tokens=2)
    leg = pair.decode()
    await pair.settle()
    leg.fail(DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded):
        await leg.receive()
    await until(lambda: pair.worker.cancelled == ["settle", "r"])
    leg.close()


async def prefilled(context: zmq.asyncio.Context) -> tuple[Pair, Leg]:
    pair = Pair(context, Role.PREFILL)
    leg = pair.prefill()
    assert isinstance(await leg.receive(), Prefilled)
    return pair, leg


async def test_a_decode_is_told_when_its_producer_is_lost(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    producer, held = await prefilled(context)
    pair.worker.default = Plan("hang", 0)
    with held, pair.decode() as leg:
        held.tie(leg)
        producer.link.lose("test")
        with pytest.raises(HandoffFailed, match="w0 gave up"):
            await leg.receive()
    await producer.link.close()
    await producer.worker.die()


async def test_a_decode_is_told_of_a_producer_lost_before_they_were_tied(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    producer, held = await prefilled(context)
    pair.worker.default = Plan("hang", 0)
    producer.link.lose("test")
    with held, pair.decode() as leg:
        held.tie(leg)
        with pytest.raises(HandoffFailed):
            await leg.receive()
    await producer.link.close()
    await producer.worker.die()


async def test_a_producer_lost_after_the_first_tokens_is_not_missed(
    pair: Pair, context: zmq.asyncio.Context
) -> None:
    producer, held = await prefilled(context)
    pair.worker.plans.append(Plan("hang", num_tokens=1))
    with held, pair.decode() as leg:
        held.tie(leg)
        await pair.settle()
        # The first tokens have arrived, though nobody has read them yet.
        producer.link.lose("test")
        assert isinstance(await leg.receive(), Tokens)
        last = Tokens(RequestId("r"), (1,), FinishReason.LENGTH)
        await pair.worker.send(b"router", last)
        assert await leg.receive() == last
    await producer.link.close()
    await producer.worker.die()
