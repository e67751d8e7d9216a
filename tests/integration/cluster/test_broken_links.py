"""Connections that break and that ZeroMQ repairs: what was on them is missed, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import zmq.asyncio

from cluster.errors import ConnectionCut
from cluster.messages import Decode, Tokens
from cluster.metrics import BROKEN_LINKS
from cluster.names import FinishReason, RequestId, Role, RouterId, WorkerId
from cluster.request_plane import Leg, WorkerLink
from cluster.sockets import Sockets
from tests.integration.fake_worker import FakeWorker, Plan
from tests.middleman import ByteMiddleman, pass_bytes
from tests.waiting import until

# Long enough that no leg ends because of a silence.
TIMEOUT_S = 60.0
PATIENT_S = 20.0


class Line:
    """A worker, a link to it, and somebody between them who cuts when told to."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.worker = FakeWorker(Sockets(context), WorkerId("w0"), Role.DECODE)
        self.middleman = ByteMiddleman(int(self.worker.socket.endpoint.rpartition(":")[2]))
        through = f"tcp://127.0.0.1:{self.middleman.port}"
        ids = RouterId("router"), self.worker.worker_id
        self.link = WorkerLink(Sockets(context), *ids, through, TIMEOUT_S)
        self.num_cuts = 0

    def open(self, name: str) -> Leg:
        return self.link.open(Decode(RequestId(name), (1,), {}, None, None, 0))

    def cut_once(self, is_meant: Callable[[bytes, bool], bool]) -> None:
        """Swallow the first piece that is meant, and with it the connection."""

        def change(data: bytes, is_answer: bool) -> bytes | None:
            if not is_meant(data, is_answer):
                return data
            self.middleman.change = pass_bytes
            self.num_cuts += 1
            return None

        self.middleman.change = change

    async def has_tallied(self) -> None:
        """Return when a heartbeat has been answered that was sent after the call."""
        for _ in range(2):
            seen_s = self.link.snapshot_s
            await until(lambda seen_s=seen_s: self.link.snapshot_s > seen_s, PATIENT_S)  # type: ignore[misc]


@pytest_asyncio.fixture
async def line() -> AsyncIterator[Line]:
    context = zmq.asyncio.Context()
    line = Line(context)
    with line.middleman:
        await until(lambda: line.link.snapshot is not None)
        yield line
        await line.link.close()
        await line.worker.die()
    context.destroy(linger=0)


def num_broken() -> float:
    return float(BROKEN_LINKS._value.get())


async def expect_loss(leg: Leg) -> None:
    async with asyncio.timeout(PATIENT_S):
        with pytest.raises(ConnectionCut, match="w0: messages were lost on the way"):
            await leg.receive()


async def test_a_leg_whose_last_tokens_are_lost_is_told(line: Line) -> None:
    before = num_broken()
    line.worker.default = Plan("finish", num_tokens=1)
    line.cut_once(lambda data, is_answer: is_answer and b"the only" in data)
    with line.open("the only tokens") as leg:
        await expect_loss(leg)
    assert not line.link.is_lost and num_broken() == before + 1
    with line.open("another") as leg:
        assert isinstance(await leg.receive(), Tokens)


async def test_a_leg_whose_request_is_lost_is_told(line: Line) -> None:
    line.cut_once(lambda data, is_answer: not is_answer and b"unheard" in data)
    with line.open("unheard") as leg:
        await expect_loss(leg)
    assert line.worker.ids == []


async def test_a_lost_cancel_is_said_again_and_touches_no_other_leg(line: Line) -> None:
    line.worker.default = Plan("hang", num_tokens=1)
    with line.open("wanted") as wanted:
        await wanted.receive()
        await line.has_tallied()
        leg = line.open("unwanted")
        await leg.receive()
        line.cut_once(lambda data, is_answer: not is_answer and b"unwanted" in data)
        leg.close()
        await until(lambda: line.worker.cancelled == ["unwanted"], PATIENT_S)
        assert line.num_cuts == 1
        last = Tokens(RequestId("wanted"), (1,), FinishReason.LENGTH, num_before=1)
        await line.worker.send(b"router", last)
        assert await wanted.receive() == last


async def test_where_nothing_was_lost_legs_go_on(line: Line) -> None:
    before = num_broken()
    line.worker.default = Plan("hang", num_tokens=1)
    with line.open("steady") as leg:
        await leg.receive()
        # A heartbeat says who sends it.
        line.cut_once(lambda data, is_answer: not is_answer and b"router" in data)
        await until(lambda: line.num_cuts == 1, PATIENT_S)
        await line.has_tallied()
        last = Tokens(RequestId("steady"), (1,), FinishReason.LENGTH, num_before=1)
        await line.worker.send(b"router", last)
        assert await leg.receive() == last
    assert num_broken() == before


async def test_a_worker_that_counts_afresh_ends_what_was_open(line: Line) -> None:
    line.worker.default = Plan("hang", num_tokens=1)
    with line.open("forgotten") as leg:
        await leg.receive()
        line.worker.socket.forget(b"router")
        await expect_loss(leg)
