"""Changed frames on every port: none crashes or stops it, none makes it take more memory than it
may. A few thousand each; a million each in `make test-full`."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import psutil
import pytest
import zmq
import zmq.asyncio

from cluster import messages
from cluster.config import parse_config
from cluster.messages import CODEC
from cluster.metrics import MALFORMED_FRAMES
from cluster.names import HandoffId, RequestId, Role, RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.sockets import Sockets
from cluster.wire import WireError
from cluster.worker import Worker
from cluster.worker_spec import WorkerSpec
from deploy.engines import ENGINES, ROLES
from kv_transfer import protocol
from kv_transfer.protocol import Refusal, Refused
from tests.integration.kv_transfer.ports import EPOCH, Open, open_side
from tests.mutation import mutated
from tests.waiting import until, wait_for
from tests.wire_seeds import (
    OFFER,
    PROTOCOLS,
    SNAPSHOT,
    TO_CONSUMER,
    TO_PRODUCER,
    TO_ROUTER,
    TO_WORKER,
)

__all__ = ["open_side"]

NUMBERS = [3_000, pytest.param(1_000_000, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]
BATCH = 500
# What a process may keep over of whatever it was sent, allocators' own ways included.
KEPT_BYTES = 96 << 20


def frames(codec: Any, kinds: list[Any], seed: int) -> Iterator[bytes]:
    return mutated([codec.encode(kind) for kind in kinds], Random(seed))


@pytest.fixture
def memory() -> Iterator[None]:
    before = psutil.Process().memory_info().rss
    yield
    assert psutil.Process().memory_info().rss - before < KEPT_BYTES


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("codec", "kinds"),
    PROTOCOLS.values(),
    ids=PROTOCOLS,
)
def test_decoders(codec: Any, kinds: list[Any], number: int, memory: None) -> None:
    num_valid = 0
    for frame in itertools.islice(frames(codec, kinds, number), number):
        try:
            message = codec.decode(frame)
        except WireError:
            continue
        num_valid += 1
        # By their bytes: what is not a number is not equal to itself.
        encoded = codec.encode(message)
        assert codec.encode(codec.decode(encoded)) == encoded, message
    assert number // 50 < num_valid < number


# The worker's port: a whole worker behind it.


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_worker(number: int, memory: None) -> None:
    config = parse_config(
        {
            "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
            "simulated": {"decode_step_s": 0.0001, "decode_step_per_request_s": 0.0},
            "router": {"worker_timeout_s": 30.0},
        }
    )
    engine, role = ENGINES["simulated"], Role.PREFILL
    spec = WorkerSpec(WorkerId("w"), role, engine, ROLES, config, (), "127.0.0.1")
    worker = Worker(spec)
    entry = await worker.start()
    running = asyncio.create_task(worker.run())
    context = zmq.asyncio.Context()
    with context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        # A worker that has ended is nobody to send to.
        stranger.setsockopt(zmq.SNDTIMEO, 30_000)
        stranger.connect(entry.endpoint)
        source = frames(CODEC, TO_WORKER, 11)
        for start in range(0, number, BATCH):
            for frame in itertools.islice(source, min(BATCH, number - start)):
                await stranger.send_multipart([frame])
            # Only the heartbeat is answered with this number.
            await stranger.send(CODEC.encode(messages.Heartbeat(RouterId("r"), number + start)))
            while not is_tally(await received(stranger), number + start):
                pass
    link = WorkerLink(Sockets(context), RouterId("fresh"), WorkerId("w"), entry.endpoint, 30.0)
    await until(lambda: link.snapshot is not None)
    assert not running.done()
    await link.close()
    context.destroy(linger=0)
    await worker.stop()
    await running


def is_tally(message: object, num_asked: int) -> bool:
    return isinstance(message, messages.Tally) and message.num_asked == num_asked


async def received(socket: Any) -> object:
    """Return the first message of what comes next."""
    frames = await asyncio.wait_for(socket.recv_multipart(), 30)
    return CODEC.decode(frames[0])


# The router's port: a worker that sends whatever it likes.


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_router(number: int, memory: None) -> None:
    context = zmq.asyncio.Context()
    with context.socket(zmq.ROUTER) as worker:
        worker.setsockopt(zmq.LINGER, 0)
        port = worker.bind_to_random_port("tcp://127.0.0.1")
        address = f"tcp://127.0.0.1:{port}"
        link = WorkerLink(Sockets(context), RouterId("r"), WorkerId("w"), address, 60.0)
        peer, *_ = await worker.recv_multipart()
        source = frames(CODEC, TO_ROUTER, 12)
        decode = messages.Decode(RequestId("d"), (1,), {}, None, None, 0)
        epochs = itertools.count(1000)
        for start in range(0, number, BATCH):
            with link.open(decode):
                for frame in itertools.islice(source, min(BATCH, number - start)):
                    await worker.send_multipart([peer, frame])
                epoch = next(epochs)
                last = replace(SNAPSHOT, epoch=epoch)
                await worker.send_multipart([peer, CODEC.encode(last)])
                await until(lambda e=epoch: link.snapshot and link.snapshot.epoch == e)  # type: ignore[misc]
        assert MALFORMED_FRAMES.labels("token")._value.get() > number / 3
        await link.close()
    context.destroy(linger=0)


# The KV plane's two ends.


@pytest.mark.parametrize("number", NUMBERS)
def test_a_producer(open_side: Open, number: int, memory: None) -> None:
    producer, consumer = open_side(), open_side()
    producer.hold("held", 5, 6, 7)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.RCVTIMEO, 30_000)
        stranger.connect(producer.port.endpoint)
        source = frames(protocol.CODEC, TO_PRODUCER, 13)
        greeting = protocol.CODEC.encode(protocol.Greet(EPOCH, ()))
        for start in range(0, number, BATCH):
            for frame in itertools.islice(source, min(BATCH, number - start)):
                stranger.send(frame)
            stranger.send(greeting)
            while not is_empty_welcome(stranger.recv_multipart()):
                pass
    producer.hold("fresh", 3, 4)
    consumer.pull(producer.offer("fresh"), 1, 2)
    wait_for(consumer.has_ended("fresh"))
    assert consumer.pulls["fresh"].failure is None
    totals = producer.port.totals()
    assert totals["frames_malformed"] > number / 3 and "port_errors" not in totals


def is_empty_welcome(answer: list[bytes]) -> bool:
    message = protocol.CODEC.decode(answer[0])
    return isinstance(message, protocol.Welcome) and not message.places


@pytest.mark.parametrize("number", NUMBERS)
def test_a_consumer(open_side: Open, number: int, memory: None) -> None:
    producer, consumer = open_side(transports=("tcp",)), open_side(transports=("tcp",))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as hostile:
        hostile.setsockopt(zmq.LINGER, 0)
        hostile.setsockopt(zmq.RCVTIMEO, 30_000)
        port = hostile.bind_to_random_port("tcp://127.0.0.1")
        rng, source = Random(14), frames(protocol.CODEC, TO_CONSUMER, 14)
        names, sent = (f"h{n}" for n in itertools.count()), 0
        while sent < number:
            name = next(names)
            offer = replace(
                OFFER, handoff_id=HandoffId(name), endpoints=(f"tcp://127.0.0.1:{port}",)
            )
            consumer.pull(offer, 1, 2)
            peer, *_ = hostile.recv_multipart()
            for frame in itertools.islice(source, BATCH):
                payload = [rng.randbytes(rng.choice((0, 1, 8192)))] if rng.random() < 0.3 else []
                hostile.send_multipart([peer, frame.replace(b"\xa1h", b"\xa2h0"), *payload])
            sent += BATCH
            hostile.send_multipart([peer, refusal(name)])
            wait_for(consumer.has_ended(name))
            while hostile.poll(0):
                hostile.recv_multipart()
    consumer.pull(producer.hold("fresh", 3, 4), 1, 2)
    wait_for(consumer.has_ended("fresh"))
    assert consumer.pulls["fresh"].failure is None
    totals = consumer.port.totals()
    assert totals["frames_malformed"] > number / 3 and "port_errors" not in totals


def refusal(name: str) -> bytes:
    encoded: bytes = protocol.CODEC.encode(Refused(HandoffId(name), Refusal.ENDED, "over"))
    return encoded
