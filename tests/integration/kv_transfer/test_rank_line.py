"""A port's line to its engine: holds ahead of their step, and waits that end when they should."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from cluster.engine_control import CODEC, Attend, HoldNow, RankLines, rank_endpoint
from cluster.names import HandoffId
from cluster.stages import without_times
from kv_transfer.port import HandoffPort
from kv_transfer.producer import Hold
from kv_transfer.progress import Growth
from kv_transfer.rank_line import RankLine
from tests.integration.kv_transfer.ports import Open, Side, open_side
from tests.waiting import wait_for

__all__ = ["open_side"]

KEY = "r"
NOW = HoldNow("h", KEY, ((3, 4),), 17)
ORDER = Hold(HandoffId("h"), KEY, ((3, 4),), 17)
# Waking a rank takes far less than it would sleep, on a busy machine, too.
SLEEP_S, SOON_S = 10.0, 5.0

Listen = Callable[..., RankLine]


@pytest.fixture(autouse=True)
def context() -> zmq.Context[zmq.Socket[bytes]]:
    """The process's own context, which stays; opened before descriptors are counted."""
    shared: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    shared.socket(zmq.PUSH).close()
    return shared


@pytest.fixture
def control() -> str:
    return f"ipc://@test-{secrets.token_hex(8)}"


@pytest.fixture
def listen(control: str) -> Iterator[Listen]:
    lines: list[RankLine] = []

    def make(port: HandoffPort, rank: int = 0, num_ranks: int = 1) -> RankLine:
        lines.append(RankLine(control, rank, num_ranks, port))
        return lines[-1]

    yield make
    for line in lines:
        line.close()
        line.close()


@pytest.fixture
def ranks(control: str) -> Iterator[RankLines]:
    lines = RankLines(control, 1)
    yield lines
    lines.close()


def _opened(side: Side) -> None:
    side.port.open(HandoffId("h"), KEY)
    side.port.grow(Growth(HandoffId("h"), ((3,),)))


def test_a_hold_does_not_wait_for_the_step_that_brings_it(
    open_side: Open, listen: Listen, ranks: RankLines
) -> None:
    """The engine is in a step all the while: nothing but the line says that the prompt is done."""
    producer, consumer = open_side(), open_side()
    line = listen(producer.port)
    _opened(producer)
    consumer.pull(producer.offer("h"), 1, 2)
    ranks.send(NOW)
    wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].failure is None
    assert consumer.content(1, 2) == producer.content(3, 4)
    wait_for(producer.has_freed(KEY))
    # With the next step the order comes, and a growth that the hold has overtaken.
    producer.port.grow(Growth(HandoffId("h"), ((4,),)))
    line.hold(ORDER)
    wait_for(lambda: not producer.port._commands)
    producer.poll()
    assert producer.freed == [KEY]
    assert "handoffs_duplicate" not in without_times(producer.port.totals())


def test_what_the_line_says_late_has_been_done(
    open_side: Open, listen: Listen, ranks: RankLines
) -> None:
    producer, consumer = open_side(), open_side()
    line = listen(producer.port)
    _opened(producer)
    line.hold(ORDER)
    ranks.send(NOW)
    # The line keeps its order: what follows has been heard after it.
    ranks.send(HoldNow("other", "s", ((5,),), 18))
    consumer.pull(producer.offer("h"), 1, 2)
    consumer.pull(producer.offer("other"), 6)
    wait_for(consumer.has_ended("h", "other"))
    wait_for(producer.has_freed(KEY, "s"))
    assert sorted(producer.freed) == [KEY, "s"]
    assert without_times(producer.port.totals())["handoffs_released"] == 2


def test_a_rank_sleeps_until_there_is_something_to_do(
    open_side: Open, listen: Listen, ranks: RankLines
) -> None:
    side = open_side()
    line = listen(side.port)
    began = time.monotonic()
    line.wait(0.2)
    assert time.monotonic() - began > 0.1, "nobody has woken it"
    for wake in (lambda: _end_a_hold(side), lambda: ranks.send(Attend())):
        timer = threading.Timer(0.02, wake)
        timer.start()
        began = time.monotonic()
        line.wait(SLEEP_S)
        assert time.monotonic() - began < SOON_S
        timer.join()


def _end_a_hold(side: Side) -> None:
    offer = side.hold("h", 1)
    side.port.abort(offer.handoff_id)


def test_who_asks_for_attention_is_waited_for(
    open_side: Open, listen: Listen, ranks: RankLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is about reaches the engine on another way, and later as well."""
    monkeypatch.setattr("kv_transfer.rank_line._ATTENTION_S", 60.0)
    line = listen(open_side().port)
    ranks.send(Attend())
    began = time.monotonic()
    line.wait(SLEEP_S)
    line.wait(SLEEP_S)
    line.wait(SLEEP_S)
    assert time.monotonic() - began < SOON_S


def test_no_rank_sleeps_over_the_news_of_another(open_side: Open, listen: Listen) -> None:
    ports = [open_side().port for _ in range(2)]
    lines = [listen(port, rank, len(ports)) for rank, port in enumerate(ports)]
    lines[1].rouse()
    began = time.monotonic()
    lines[0].wait(SLEEP_S)
    assert time.monotonic() - began < SOON_S


def test_what_is_no_message_is_dropped(
    open_side: Open, listen: Listen, control: str, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    producer, consumer = open_side(), open_side()
    listen(producer.port)
    with context.socket(zmq.PUSH) as stray:
        stray.setsockopt(zmq.LINGER, 1000)
        stray.connect(rank_endpoint(control, 0))
        for frame in (b"", b"\x00", b"\x93\x04\x08\x90", CODEC.encode(NOW)):
            stray.send(frame)
        consumer.pull(producer.offer("h"), 1, 2)
        wait_for(consumer.has_ended("h"))
    assert consumer.pulls["h"].failure is None
