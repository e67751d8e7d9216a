"""When a link misses its producer: not while it answers, and not in a pull's stead."""

from typing import Any

import zmq

from kv_transfer.links import Link
from kv_transfer.protocol import CODEC, Greet, Release, Via, Welcome
from kv_transfer.tcp import TcpTransport

TIMEOUT_S = 1.0
WELCOME = Welcome(7, ())


class Lane:
    """Takes messages until it is broken."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.is_broken = False

    def send(self, frame: bytes, flags: int) -> None:
        if self.is_broken:
            raise zmq.Again
        self.sent.append(CODEC.decode(frame))


def opened(now: float) -> tuple[Link, Any]:
    """Return a link that was used at `now`, and its lane."""
    lane: Any = Lane()
    link = Link(7, {Via.TCP: TcpTransport(0)}, 1, lambda: lane)
    link.send(Release("h", 7, is_loaded=True), now)  # type: ignore[arg-type]
    lane.sent.clear()
    return link, lane


def test_a_producer_that_answers_is_never_missed() -> None:
    link, lane = opened(100.0)
    for tick in range(1000, 1300):
        assert link.check(tick / 10) and not link.is_dead(tick / 10, TIMEOUT_S)
        if lane.sent:
            assert lane.sent == [Greet(7, (Via.TCP,))]
            lane.sent.clear()
            assert list(link.welcome(WELCOME, tick / 10 + 0.05)) == []


def test_one_that_does_not_is_greeted_once_and_missed() -> None:
    link, lane = opened(100.0)
    assert link.check(102.9) and lane.sent == []
    for now in (103.0, 103.5):
        assert link.check(now) and len(lane.sent) == 1
    assert not link.is_dead(103.9, TIMEOUT_S)
    assert link.is_dead(104.0, TIMEOUT_S)


def test_a_pull_that_begins_meanwhile_gives_up_by_itself() -> None:
    link, _ = opened(100.0)
    link.check(103.0)
    link.last_used = 103.5
    assert not link.is_dead(104.0, TIMEOUT_S)


def test_a_connection_that_takes_nothing_is_reported() -> None:
    link, lane = opened(100.0)
    lane.is_broken = True
    assert link.check(102.0) and not link.check(103.0)


def test_one_that_is_told_to_wait_is_not_idle() -> None:
    link, _ = opened(100.0)
    link.last_heard = 170.0
    assert not link.is_idle(180.0)
    assert link.is_idle(231.0)
