"""What the transports between two processes promise, and what when one of them is killed."""

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.blocks import Content
from tests.contract.handoff_sides import (
    ACROSS,
    SECTION,
    STALL_S,
    Open,
    Side,
    content,
    side_over,
    store_of,
)
from tests.contract.other_process import heard
from tests.waiting import wait_for

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


def _produce(kind: str, pipe: "Connection[Any, Any]") -> None:
    side = side_over([kind], SECTION, 77)
    pipe.send(side.hold("h", range(1, 400)))
    if pipe.recv() == "slowly":
        # Deaf from here on: the consumer sits in the middle of the hand-off.
        gather = side.store.gather
        blocked = threading.Event()

        def stop(group: int, block_ids: Sequence[int], into: memoryview) -> None:
            if block_ids[0] > 100:
                pipe.send("in the middle")
                blocked.wait()
            gather(group, block_ids, into)

        side.store.gather = stop  # type: ignore[method-assign]
    pipe.send("go")
    signal.pause()


def _produce_and_stop_sending(timeout_s: float, pipe: "Connection[Any, Any]") -> None:
    """Announce every chunk, and send all but the third."""
    section = SECTION.model_copy(update={"transports": ("gloo",), "stall_timeout_s": timeout_s})
    side = Side(section, 77)
    from kv_transfer.gloo import GlooChannel

    send, num_sends, blocked = GlooChannel.send, 0, threading.Event()

    def stop(channel: GlooChannel, memory: Any) -> None:
        nonlocal num_sends
        num_sends += 1
        if num_sends == 3:
            pipe.send("in the middle")
            blocked.wait()
        send(channel, memory)

    GlooChannel.send = stop  # type: ignore[method-assign, assignment]
    pipe.send(side.hold("h", range(1, 400)))
    signal.pause()


def _consume(kind: str, pipe: "Connection[Any, Any]") -> None:
    side = side_over([kind], SECTION, 78)
    blocked = threading.Event()

    def stop(group: int, block_ids: Sequence[int], payload: Content) -> None:
        pipe.send("in the middle")
        blocked.wait()

    side.store.scatter = stop  # type: ignore[method-assign]
    pipe.send("up")
    side.pull(pipe.recv(), range(1, 400))
    signal.pause()


@pytest.mark.parametrize("kind", ACROSS)
def test_blocks_cross_processes(open_side: Open, other: Any, kind: str) -> None:
    consumer = open_side(kind)
    _, pipe = other(_produce, kind)
    offer = heard(pipe)
    pipe.send("at once")
    assert heard(pipe) == "go"
    consumer.pull(offer, range(1, 400))
    wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].failure is None
    assert consumer.pulls["h"].receipt.transport == kind
    assert content(consumer.store, range(1, 400)) == content(store_of(77), range(1, 400))


@pytest.mark.parametrize("kind", ["shm", "tcp", "gloo"])
def test_a_producer_that_is_killed_in_the_middle(open_side: Open, other: Any, kind: str) -> None:
    consumer, survivor = open_side(kind, stall_timeout_s=STALL_S), open_side(kind)
    process, pipe = other(_produce, kind)
    offer = heard(pipe)
    pipe.send("slowly")
    assert heard(pipe) == "go"
    consumer.pull(offer, range(1, 400))
    assert heard(pipe) == "in the middle"
    process.kill()
    process.join()
    wait_for(consumer.has_ended("h"), 10)
    failure = consumer.pulls["h"].failure or ""
    # A channel ends with the process at its other end, if something is on its way just then.
    assert "no data for" in failure or f"transport: {kind}: " in failure
    consumer.pull(survivor.hold("after", range(1, 30)), range(1, 30))
    wait_for(consumer.has_ended("after"))
    assert consumer.pulls["after"].failure is None


@pytest.mark.parametrize("kind", ACROSS)
def test_a_consumer_that_is_killed_in_the_middle(open_side: Open, other: Any, kind: str) -> None:
    """What it had not taken is taken back, long before the lease of the hand-off ends."""
    if kind == "cma" and YAMA.exists() and int(YAMA.read_text()) > 0:
        pytest.skip("kernel.yama.ptrace_scope keeps a child out of its parent's memory")
    producer, consumer = open_side(kind, lease_s=3.0, stall_timeout_s=STALL_S), open_side(kind)
    process, pipe = other(_consume, kind)
    assert heard(pipe) == "up"
    pipe.send(producer.hold("h", range(1, 400)))
    assert heard(pipe) == "in the middle"
    process.kill()
    process.join()
    wait_for(lambda: "out=0" in repr(producer.port), 10)
    # On a busy machine a living reader can be too slow for this producer as well, and tries again.
    names = [f"after-{number}" for number in range(5)]
    for name in names:
        consumer.pull(producer.hold(name, range(1, 400)), range(1, 400))
        wait_for(consumer.has_ended(name))
        if consumer.pulls[name].failure is None:
            break
    assert consumer.pulls[name].failure is None
    wait_for(producer.has_freed("h", *consumer.pulls), 10)


def test_a_producer_that_is_killed_while_its_blocks_are_read(open_side: Open, other: Any) -> None:
    consumer = open_side("cma", stall_timeout_s=STALL_S)
    process, pipe = other(_produce, "cma")
    offer = heard(pipe)
    pipe.send("at once")
    assert heard(pipe) == "go"
    scatter = consumer.store.scatter

    def scatter_from_the_dead(group: int, block_ids: Sequence[int], payload: Content) -> None:
        process.kill()
        process.join()
        scatter(group, block_ids, payload)

    consumer.store.scatter = scatter_from_the_dead  # type: ignore[method-assign]
    consumer.pull(offer, range(1, 400))
    wait_for(consumer.has_ended("h"), 10)
    assert "blocks could not be read: " in (consumer.pulls["h"].failure or "")


def test_a_producer_that_is_killed_in_the_middle_of_a_send(open_side: Open, other: Any) -> None:
    """Its reader, which waits for the bytes, hears of it long before it would call it stalled."""
    consumer, survivor = open_side("gloo"), open_side("gloo")
    process, pipe = other(_produce_and_stop_sending, 10.0)
    consumer.pull(heard(pipe), range(1, 400))
    assert heard(pipe) == "in the middle"
    process.kill()
    process.join()
    wait_for(consumer.has_ended("h"), 3)
    assert "transport: gloo: " in (consumer.pulls["h"].failure or "")
    consumer.pull(survivor.hold("after", range(1, 30)), range(1, 30))
    wait_for(consumer.has_ended("after"))
    assert consumer.pulls["after"].failure is None


def test_a_producer_that_freezes_in_the_middle_of_a_send(open_side: Open, other: Any) -> None:
    """It is there, and says nothing: the time-out ends the pull, and the channel with it."""
    consumer = open_side("gloo", stall_timeout_s=STALL_S)
    process, pipe = other(_produce_and_stop_sending, 10.0)
    offer = heard(pipe)
    consumer.pull(offer, range(1, 400))
    assert heard(pipe) == "in the middle"
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(consumer.has_ended("h"), 5)
    assert consumer.pulls["h"].failure
