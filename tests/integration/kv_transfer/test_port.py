"""Two hand-off ports over real loopback sockets: transfers, losses, garbage, and what is left."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
import zmq

from cluster.names import HandoffId
from cluster.stages import times_in, without_times
from kv_transfer.protocol import CODEC, ReadBlocks, Refusal, Refused, Release, Renew
from tests.integration.kv_transfer.ports import (
    EPOCH,
    LAYOUT,
    NUM_BLOCKS,
    SECTION,
    Open,
    Side,
    open_side,
)
from tests.waiting import wait_for

__all__ = ["open_side"]


def test_blocks_cross_real_sockets(open_side: Open) -> None:
    producer, consumer = open_side(), open_side()
    consumer.pull(producer.hold("h", 3, 9, 4, 20, 5), 1, 2, 30, 31, 32)
    wait_for(consumer.has_ended("h"))
    ended = consumer.pulls["h"]
    assert ended.failure is None
    assert ended.receipt.received_bytes == ended.receipt.produced_bytes == 5 * 4096
    assert consumer.content(1, 2, 30, 31, 32) == producer.content(3, 9, 4, 20, 5)
    wait_for(producer.has_freed("h"))
    assert ended.receipt.transport == "shm"
    num_bytes = 5 * 4096
    sent, received = producer.port.totals(), consumer.port.totals()
    assert without_times(sent) == {"handoffs_released": 1, "bytes_sent": num_bytes}
    assert without_times(received) == {
        "pulls_loaded": 1,
        "bytes_received": num_bytes,
        "via_shm": num_bytes,
    }
    assert set(times_in(sent)) == {"gather"}
    assert set(times_in(received)) == {"pull", "verify", "scatter"}


def test_a_port_can_pull_from_itself(open_side: Open) -> None:
    side = open_side()
    side.pull(side.hold("h", 3, 4), 100, 101)
    wait_for(side.has_ended("h"))
    wait_for(side.has_freed("h"))
    assert side.content(100, 101) == side.content(3, 4)


def test_a_pull_before_its_hold_waits_for_it(open_side: Open) -> None:
    producer, consumer = open_side(), open_side()
    consumer.pull(producer.offer("h"), 1, 2)
    wait_for(lambda: "parked=1" in repr(producer.port))
    producer.hold("h", 3, 4)
    wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].failure is None
    assert consumer.content(1, 2) == producer.content(3, 4)


def test_a_producer_that_ends_in_the_middle_stalls_the_pull(open_side: Open) -> None:
    producer, consumer = open_side(), open_side()
    many = tuple(range(1, 400))
    before = consumer.content(*many)
    closing = threading.Thread(target=producer.port.close)
    gather = producer.store.gather
    gathered: list[tuple[int, ...]] = []

    def gather_and_close(group: int, block_ids: tuple[int, ...], into: memoryview) -> None:
        gathered.append(block_ids)
        # Two are asked for at first: a third means that one has arrived.
        if len(gathered) == 3:
            closing.start()
        gather(group, block_ids, into)

    producer.store.gather = gather_and_close  # type: ignore[method-assign, assignment]
    consumer.pull(producer.hold("h", *many), *many)
    wait_for(consumer.has_ended("h"), SECTION.stall_timeout_s * 4)
    failure = consumer.pulls["h"].failure
    assert failure is not None and "no data for 0.5 s" in failure
    assert consumer.content(*many) != before, "part of it had arrived"
    closing.join()


def test_a_dead_endpoint_stalls_the_pull(open_side: Open) -> None:
    producer, consumer = open_side(), open_side()
    offer = producer.hold("h", 1)
    producer.port.close()
    consumer.pull(offer, 1)
    wait_for(consumer.has_ended("h"), SECTION.stall_timeout_s * 4)
    assert "no data" in (consumer.pulls["h"].failure or "")


@pytest.mark.parametrize("endpoint", ["", "nonsense", "tcp://127.0.0.1", "tcp://256.0.0.1:1"])
def test_an_endpoint_that_is_none_fails_its_pull_only(open_side: Open, endpoint: str) -> None:
    producer, consumer = open_side(), open_side()
    good = producer.hold("good", 3, 4)
    consumer.port.announce(replace(producer.offer("bad"), endpoints=(endpoint,)))
    consumer.pull(replace(producer.offer("bad"), endpoints=(endpoint,)), 10, 11)
    consumer.pull(good, 1, 2)
    wait_for(consumer.has_ended("good", "bad"))
    assert consumer.pulls["good"].failure is None
    assert "no data" in (consumer.pulls["bad"].failure or "")


def test_a_cancelled_pull_frees_both_sides(open_side: Open) -> None:
    producer, consumer = open_side(stall_timeout_s=20), open_side(stall_timeout_s=20)
    many = tuple(range(1, 500))
    offer = producer.hold("h", *many)
    consumer.pull(offer, *many)
    consumer.port.cancel("h")
    wait_for(consumer.has_ended("h"), 1.0)
    assert consumer.pulls["h"].failure == "cancelled"
    wait_for(producer.has_freed("h"), 1.0)


def test_a_lease_runs_out_and_renewals_keep_it(open_side: Open) -> None:
    producer, consumer = open_side(lease_s=0.6), open_side(lease_s=0.6)
    producer.hold("unwanted", 1)
    consumer.port.announce(producer.hold("wanted", 2))
    wait_for(producer.has_freed("unwanted"), 3.0)
    producer.hold("second unwanted", 3)
    wait_for(producer.has_freed("second unwanted"), 3.0)
    assert producer.freed == ["unwanted", "second unwanted"]
    consumer.port.give_up(producer.offer("wanted"))
    wait_for(producer.has_freed("wanted"), 1.0)


@pytest.mark.parametrize(("checksum", "is_loaded"), [(True, False), (False, True)])
def test_the_injected_fault_is_found_by_checksums(
    open_side: Open, checksum: bool, is_loaded: bool
) -> None:
    producer = open_side(checksum=checksum)
    consumer = open_side(checksum=checksum, fault="corrupt_received_block")
    before = consumer.content(1, 2)
    consumer.pull(producer.hold("h", 3, 4), 1, 2)
    wait_for(consumer.has_ended("h"))
    failure = consumer.pulls["h"].failure
    if is_loaded:
        assert failure is None
        assert consumer.content(1) != producer.content(3)
        assert consumer.content(2) == producer.content(4)
    else:
        assert failure is not None and "checksum" in failure
        assert consumer.content(1, 2) == before


def test_a_store_that_breaks_does_not_end_the_port(open_side: Open) -> None:
    producer, consumer = open_side(), open_side()
    gather, broken = producer.store.gather, [True]

    def gather_or_break(group: int, block_ids: tuple[int, ...], into: memoryview) -> None:
        if broken and broken.pop():
            raise MemoryError("no room for a copy")
        gather(group, block_ids, into)

    producer.store.gather = gather_or_break  # type: ignore[method-assign, assignment]
    consumer.pull(producer.hold("first", 3), 1)
    wait_for(consumer.has_ended("first"))
    consumer.pull(producer.hold("second", 4), 2)
    wait_for(consumer.has_ended("second"))
    assert consumer.pulls["second"].failure is None
    wait_for(producer.has_freed("first", "second"))
    assert "no room for a copy" in (consumer.pulls["first"].failure or "")
    assert producer.port.totals()["reads_broken"] == 1


def test_pulls_outlive_a_pause_of_their_process(open_side: Open) -> None:
    """What was said meanwhile is heard before anybody is called silent."""
    producer, consumer = open_side(transports=("tcp",)), open_side(transports=("tcp",))
    names = [f"h{number}" for number in range(8)]
    offers = [producer.offer(name) for name in names]
    for number, offer in enumerate(offers):
        consumer.pull(offer, 2 * number + 1, 2 * number + 2)
    wait_for(lambda: producer.port.producer._parked)
    is_over = threading.Event()

    def stand_still() -> None:
        is_over.wait(10)

    consumer.port._command(stand_still)
    for number, name in enumerate(names):
        producer.hold(name, 2 * number + 1, 2 * number + 2)
    time.sleep(2 * SECTION.stall_timeout_s)
    is_over.set()
    wait_for(consumer.has_ended(*names))
    assert [consumer.pulls[name].failure for name in names] == [None] * len(names)


# Bytes that are no messages.


@pytest.fixture
def stranger() -> Iterator[Callable[[str], "zmq.Socket[bytes]"]]:
    """Connect raw sockets to a port."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def connect(endpoint: str) -> "zmq.Socket[bytes]":
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(endpoint)
        sockets.append(socket)
        return socket

    yield connect
    for socket in sockets:
        socket.close()
    context.term()


def assert_still_serving(producer: Side, consumer: Side, name: str) -> None:
    consumer.pull(producer.hold(name, 3, 4), 1, 2)
    wait_for(consumer.has_ended(name))
    assert consumer.pulls[name].failure is None


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\xc1"],
        [b"garbage"],
        [CODEC.encode(Refused(HandoffId("h"), Refusal.ENDED, "not a consumer's"))],
        [CODEC.encode(Renew(HandoffId("h"), 1)), b"a frame too many"],
        [b"\x93" + b"\x93" * 5000],
        [b""] * 300,
    ],
)
def test_garbage_is_counted_and_dropped(
    open_side: Open, stranger: Callable[[str], "zmq.Socket[bytes]"], frames: list[bytes]
) -> None:
    producer, consumer = open_side(), open_side()
    stranger(producer.port.endpoint).send_multipart(frames)
    wait_for(lambda: producer.port.totals().get("frames_malformed") == 1)
    assert_still_serving(producer, consumer, "after")


def test_a_request_too_large_is_not_taken_in(
    open_side: Open, stranger: Callable[[str], "zmq.Socket[bytes]"]
) -> None:
    producer, consumer = open_side(), open_side()
    before = psutil.Process().memory_info().rss
    stranger(producer.port.endpoint).send(bytes(64 << 20))
    assert_still_serving(producer, consumer, "after")
    assert "frames_malformed" not in producer.port.totals()
    # The sender's copy is 64 MiB; the port's would be another.
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_strangers_learn_nothing(
    open_side: Open, stranger: Callable[[str], "zmq.Socket[bytes]"]
) -> None:
    producer, consumer = open_side(), open_side()
    producer.hold("h", 1, 2)
    socket = stranger(producer.port.endpoint)
    for epoch, fingerprint, cause in (
        (0, LAYOUT.fingerprint, Refusal.STALE_EPOCH),
        (EPOCH, "f" * 32, Refusal.LAYOUT),
    ):
        socket.send(CODEC.encode(ReadBlocks(HandoffId("h"), epoch, fingerprint, 0, 0, 1)))
        (answer,) = socket.recv_multipart()
        assert CODEC.decode(answer).cause is cause
    socket.send(CODEC.encode(Release(HandoffId("h"), 0, is_loaded=True)))
    assert_still_serving(producer, consumer, "after")
    assert "h" not in producer.freed


def test_thousands_of_mutated_frames_harm_nobody(
    open_side: Open, stranger: Callable[[str], "zmq.Socket[bytes]"]
) -> None:
    producer, consumer = open_side(), open_side()
    producer.hold("held", 5, 6, 7)
    rng = random.Random(20240)
    name = HandoffId("held")
    seeds = [
        CODEC.encode(ReadBlocks(name, EPOCH, LAYOUT.fingerprint, 0, 0, 2)),
        CODEC.encode(Renew(name, EPOCH)),
        CODEC.encode(Release(HandoffId("nobody"), EPOCH, is_loaded=False)),
    ]
    socket = stranger(producer.port.endpoint)
    for _ in range(4000):
        frame = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        socket.send(frame[: rng.randint(0, len(frame))] if rng.random() < 0.2 else frame)
    socket.send(b"the last")
    assert_still_serving(producer, consumer, "after")
    wait_for(lambda: producer.port.totals().get("frames_malformed", 0) > 1000, 30)
    assert "port_errors" not in producer.port.totals()


# Many at once.


def test_two_hundred_handoffs_with_cancellation_leave_nothing(open_side: Open) -> None:
    rng = random.Random(7)
    producer, consumer = open_side(), open_side()
    pulled, whole = [], []
    for index in range(200):
        name = f"h{index}"
        theirs = tuple(rng.sample(range(1, NUM_BLOCKS), rng.randint(1, 6)))
        ours = (1 + index * 2, 2 + index * 2)[: len(theirs)]
        offer = producer.hold(name, *theirs[: len(ours)])
        fate = rng.choice(["pull", "pull", "pull", "cancel", "abort", "give up"])
        if fate == "give up":
            consumer.port.announce(offer)
            consumer.port.give_up(offer)
            continue
        consumer.pull(offer, *ours)
        pulled.append(name)
        if fate == "cancel":
            consumer.port.cancel(name)
        elif fate == "abort":
            producer.port.abort(HandoffId(name))
        else:
            whole.append((name, theirs[: len(ours)], ours))
    wait_for(consumer.has_ended(*pulled))
    wait_for(producer.has_freed(*(f"h{index}" for index in range(200))))
    assert len(producer.freed) == 200
    for name, theirs, ours in whole:
        assert consumer.pulls[name].failure is None
        assert consumer.content(*ours) == producer.content(*theirs)
    assert "<Producer held=0 parked=0 out=0>" in repr(producer.port)
    wait_for(lambda: "<Consumer pulling=0 announced=0>" in repr(consumer.port))
