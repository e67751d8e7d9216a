"""The ASGI layer with small apps in place of vLLM's, and a client made of a few messages."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import pytest

from cluster.errors import (
    ConfigError,
    DeadlineExceeded,
    HandoffFailed,
    Overloaded,
    RequestInvalid,
    TandemError,
    Unavailable,
    WorkerLost,
)
from router.exchange import (
    AsgiApp,
    Exchange,
    ExchangeLayer,
    Message,
    Receive,
    Scope,
    Send,
    current_exchange,
)
from router.http_errors import HttpFailure, failure_of

LIMIT = 100
FAILURE = HttpFailure(
    HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError", "no worker", retry_after_s=1.2
)

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"x/y")]}


def chunk(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


@dataclass
class Record:
    prefill_worker: str | None = "prefill-0"
    decode_worker: str | None = None


@dataclass
class Client:
    """Sends `parts` as the request body, leaves when told, and keeps what it receives."""

    parts: list[bytes] = field(default_factory=lambda: [b"{}"])
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    method: str = "POST"
    path: str = "/v1/completions"
    received: list[Message] = field(default_factory=list)
    has_left: asyncio.Event = field(default_factory=asyncio.Event)
    num_parts_read: int = 0

    async def receive(self) -> Message:
        if self.num_parts_read == len(self.parts):
            await self.has_left.wait()
            return {"type": "http.disconnect"}
        body = self.parts[self.num_parts_read]
        self.num_parts_read += 1
        more = self.num_parts_read < len(self.parts)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(self, message: Message) -> None:
        self.received.append(message)

    async def call(self, app: AsgiApp) -> None:
        layer = ExchangeLayer(app, {"known": Record()}.get, LIMIT)
        scope = {
            "type": "http",
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
        }
        await layer(scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.received[0]["status"])

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.received[0]["headers"] if key == name.encode()]
        assert len(found) <= 1
        return found[0].decode() if found else None

    @property
    def body(self) -> bytes:
        return b"".join(bytes(message["body"]) for message in self.received[1:])

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


async def read_body(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            return body


def app_of(answer: Callable[[Send], Awaitable[None]]) -> AsgiApp:
    """An app that reads its request, then answers."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await answer(send)

    return app


async def answer_ok(send: Send) -> None:
    await send(dict(START))
    await send(chunk(b"fine", more=False))


async def test_answer_passes_with_its_identity() -> None:
    async def answer(send: Send) -> None:
        with current_exchange().running(1, at_most=1):
            await answer_ok(send)

    client = Client(headers=[(b"x-request-id", b"known")])
    await client.call(app_of(answer))
    assert (client.status, client.body) == (200, b"fine")
    assert client.header("content-type") == "x/y"
    assert client.header("x-request-id") == "known"
    assert client.header("x-tandem-prefill-worker") == "prefill-0"
    assert client.header("x-tandem-decode-worker") is None


async def test_who_ran_nothing_is_told_of_no_workers() -> None:
    """Whoever is kept out, or asks for something else, may have named a request of another's."""
    client = Client(headers=[(b"x-request-id", b"known")])
    await client.call(app_of(answer_ok))
    assert client.header("x-request-id") == "known"
    assert client.header("x-tandem-prefill-worker") is None


def test_sequences_are_counted_while_they_run() -> None:
    exchange = Exchange("a")
    with exchange.running(3, at_most=4):
        with pytest.raises(RequestInvalid, match="max_sequences"), exchange.running(2, 4):
            raise AssertionError("ran")
        with exchange.running(1, at_most=4):
            pass
    with exchange.running(4, at_most=4):
        pass


async def test_missing_id_is_made_and_shown_to_the_app() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        seen.extend(value for key, value in scope["headers"] if key == b"x-request-id")
        seen.append(current_exchange().exchange_id.encode())
        await answer_ok(send)

    client = Client()
    await client.call(app)
    assert len(set(seen)) == 1
    assert client.header("x-request-id") == seen[0].decode()


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"caf\xe9", b"a\nb", b"known "])
async def test_bad_id_is_refused(given: bytes) -> None:
    client = Client(headers=[(b"x-request-id", given)])
    await client.call(app_of(answer_ok))
    assert client.status == 400
    assert client.error["param"] == "x-request-id"
    assert client.header("x-request-id") not in (None, given.decode("latin-1"))


async def test_response_is_held_until_the_first_token() -> None:
    client = Client()

    async def answer(send: Send) -> None:
        await send(dict(START))
        await send(chunk(b"created "))
        assert not client.received
        current_exchange().has_tokens = True
        await send(chunk(b"token "))
        assert len(client.received) == 3
        await send(chunk(b"token", more=False))

    await client.call(app_of(answer))
    assert client.body == b"created token token"


async def test_failure_replaces_a_held_response() -> None:
    async def answer(send: Send) -> None:
        await send(dict(START))
        await send(chunk(b"created"))
        current_exchange().fail(FAILURE)
        await send(chunk(b"error"))
        await send(chunk(b"", more=False))

    client = Client()
    await client.call(app_of(answer))
    assert client.status == 503
    assert client.header("retry-after") == "2"
    assert client.header("content-type") == "application/json"
    assert client.header("content-length") == str(len(client.body))
    assert client.header("x-request-id")
    assert client.error == {
        "message": "no worker",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }
    assert len(client.received) == 2


async def test_failure_after_tokens_stays_in_the_stream() -> None:
    async def answer(send: Send) -> None:
        await send(dict(START))
        current_exchange().has_tokens = True
        await send(chunk(b"token "))
        current_exchange().fail(FAILURE)
        await send(chunk(b"error", more=False))

    client = Client()
    await client.call(app_of(answer))
    assert (client.status, client.body) == (200, b"token error")


async def test_failure_after_tokens_of_an_answer_not_yet_begun() -> None:
    """A second prompt's failure, say, while the first one's tokens wait for it."""

    async def answer(send: Send) -> None:
        current_exchange().has_tokens = True
        current_exchange().fail(FAILURE)
        await answer_ok(send)

    client = Client()
    await client.call(app_of(answer))
    assert client.status == 503


async def test_first_failure_is_told() -> None:
    async def answer(send: Send) -> None:
        current_exchange().fail(FAILURE)
        current_exchange().fail(HttpFailure(HTTPStatus.BAD_REQUEST, "x", "y"))
        await answer_ok(send)

    client = Client()
    await client.call(app_of(answer))
    assert client.status == 503


async def test_anthropic_clients_get_their_shape() -> None:
    async def answer(send: Send) -> None:
        current_exchange().fail(FAILURE)
        await answer_ok(send)

    client = Client(path="/v1/messages")
    await client.call(app_of(answer))
    error = {"type": "ServiceUnavailableError", "message": "no worker"}
    assert json.loads(client.body) == {"type": "error", "error": error}


async def test_other_methods_are_not_held() -> None:
    client = Client(method="GET", parts=[b""])

    async def answer(send: Send) -> None:
        await send(dict(START))
        await send(chunk(b"part"))
        assert len(client.received) == 2
        await send(chunk(b"", more=False))

    await client.call(app_of(answer))
    assert client.body == b"part"


@pytest.mark.parametrize("length", [LIMIT + 1, 10**30])
async def test_long_body_is_refused_unread(length: int) -> None:
    client = Client(headers=[(b"content-length", b"%d" % length)])
    await client.call(app_of(answer_ok))
    assert client.status == 413
    assert client.num_parts_read == 0


async def test_long_chunked_body_is_refused_at_the_limit() -> None:
    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await read_body(receive)
        except Exception:
            # As FastAPI does.
            await send({**START, "status": 400})
            await send(chunk(b"cannot parse", more=False))

    client = Client(parts=[b"x" * 30] * 50)
    await client.call(app)
    assert client.status == 413
    assert client.num_parts_read == 4


async def test_body_at_the_limit_passes() -> None:
    client = Client(parts=[b"x" * (LIMIT // 2)] * 2, headers=[(b"content-length", b"100")])
    await client.call(app_of(answer_ok))
    assert client.status == 200


async def test_leaving_closes_what_runs_and_tells_the_app() -> None:
    client = Client()
    closed: list[str] = []
    heard: list[Message] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        await read_body(receive)
        exchange = current_exchange()
        exchange.on_close(lambda: closed.append("generation"))
        client.has_left.set()
        heard.append(await receive())
        assert exchange.is_closed
        assert closed == ["generation"]

    await asyncio.wait_for(client.call(app), 1)
    assert heard == [{"type": "http.disconnect"}]


async def test_leaving_before_the_body_is_whole() -> None:
    client = Client(parts=[])
    client.has_left.set()

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        assert current_exchange().is_closed

    await client.call(app)
    assert not client.received


@pytest.mark.parametrize("ending", [RuntimeError("a bug"), asyncio.CancelledError()])
async def test_the_end_of_the_app_closes_what_runs(ending: BaseException) -> None:
    closed: list[str] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        await read_body(receive)
        kept, forgotten = (lambda: closed.append("kept")), (lambda: closed.append("forgotten"))
        exchange = current_exchange()
        exchange.on_close(kept)
        exchange.on_close(forgotten)
        exchange.forget(forgotten)
        raise ending

    with pytest.raises(type(ending)):
        await Client().call(app)
    assert closed == ["kept"]
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_exchanges_do_not_mix() -> None:
    async def answer(send: Send) -> None:
        exchange_id = current_exchange().exchange_id
        await asyncio.sleep(0)
        assert current_exchange().exchange_id == exchange_id
        await send(dict(START))
        await send(chunk(exchange_id.encode(), more=False))

    clients = [Client(headers=[(b"x-request-id", b"id-%d" % index)]) for index in range(20)]
    await asyncio.gather(*(client.call(app_of(answer)) for client in clients))
    assert [client.body for client in clients] == [b"id-%d" % index for index in range(20)]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("x", retry_after_s=0.2), 429, b"1"),
        (Overloaded("x", retry_after_s=7.1), 429, b"8"),
        (Unavailable("x"), 503, b"1"),
        (WorkerLost("x"), 503, b"1"),
        (HandoffFailed("x"), 503, b"1"),
        (DeadlineExceeded("x"), 504, None),
        (RequestInvalid("x"), 400, None),
        (ConfigError("x"), 500, None),
    ],
)
def test_status_of_an_error(error: TandemError, status: int, retry_after: bytes | None) -> None:
    failure = failure_of(error)
    assert failure.status == status
    assert dict(failure.headers()).get(b"retry-after") == retry_after
    assert json.loads(failure.body())["error"]["message"] == "x"
