"""The client: when an endpoint counts as gone, which connections are ready, pools sampled."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from deploy.loadtest import client as clients
from deploy.loadtest import run as runs
from deploy.loadtest.client import Client
from deploy.loadtest.connection import Address, Answer, Connection, ConnectionPool
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.run import LoadRun
from deploy.loadtest.words import RequestRecord, Send


class Pool:
    """Takes requests; a test answers them."""

    def __init__(self, _address: Address) -> None:
        self.answers: list[Answer] = []

    def send(self, _request: bytes, answer: Answer) -> None:
        self.answers.append(answer)


def test_an_endpoint_is_gone_if_failures_span_a_time_without_any_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(clients, "ConnectionPool", Pool)
    monkeypatch.setattr("time.monotonic", lambda: now)
    client = Client(Endpoint("http://127.0.0.1:1", "m"))
    for index in range(4):
        client.begin(RequestRecord(index, Send(0.0, (1,), 9), 0.0), b"", lambda _record: None)
    streaming, *others = client._pool.answers  # type: ignore[attr-defined]
    streaming.on_head(200, {})
    others[0].on_lost("refused")
    now = 20.0
    seen = [(client.failing_since, client.failing_s)]
    others[1].on_lost("refused")
    seen.append((client.failing_since, client.failing_s))
    streaming.on_body(b"data: ", now)
    seen.append((client.failing_since, client.failing_s))
    others[2].on_lost("refused")
    seen.append((client.failing_since, client.failing_s))
    # One failure spans nothing, and a token of any request ends the span.
    assert seen == [(0.0, 0.0), (0.0, 20.0), (None, 0.0), (20.0, 0.0)]


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)


async def test_a_connection_that_is_closed_while_others_open_is_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Transport] = []

    async def create(make: Callable[[], Connection], *_: Any, **__: Any) -> tuple[Any, Connection]:
        connection, transport = make(), Transport()
        connection.connection_made(transport)
        opened.append(transport)
        if len(opened) == 2:
            # Meanwhile the first one is closed again.
            await asyncio.sleep(0)
            first = next(each for each in pool._all if each is not connection)
            first.connection_lost(None)
        return transport, connection

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create)
    pool = ConnectionPool(Address("h", 1))
    await pool.warm(2)
    assert len(pool._idle) == 1
    pool._idle[0].begin(b"GET", Pool(Address("h", 1)), is_fresh=False)  # type: ignore[arg-type]
    assert [transport.written for transport in opened] == [b"", b"GET"]


@pytest.mark.parametrize(
    ("answers", "sampled"), [("x..", 0), ("wxw.", 2)], ids=["no such page", "a page once missing"]
)
async def test_pools_are_sampled_as_long_as_the_page_has_been_there(
    monkeypatch: pytest.MonkeyPatch, answers: str, sampled: int
) -> None:
    left = iter(answers)

    class Reader:
        zero = 0.0

        async def read(self, _path: str, _timeout_s: float) -> Any:
            match next(left):
                case "w":
                    return {"workers": [{"role": "decode", "state": "ready"}]}
                case "x":
                    return None
            raise asyncio.CancelledError

    monkeypatch.setattr(runs, "_BEAT_S", 0.0)
    run = LoadRun([], datetime(2026, 1, 1, tzinfo=UTC))
    sampling = asyncio.create_task(runs._sample_pools(Reader(), run))  # type: ignore[arg-type]
    await asyncio.wait({sampling})
    assert sampling.cancelled() is (sampled > 0)
    assert [sample[1:] for sample in run.pools] == [(0, 1)] * sampled
