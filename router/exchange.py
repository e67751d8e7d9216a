"""The ASGI layer around the whole HTTP surface: identity, body limit, honest status, disconnect.

A streaming route returns its response before its engine call runs, so a request that fails
before its first token would be a 200 with an error inside. This layer therefore holds a POST's
`http.response.start` until a token, a failure or the end of the body, and on a failure sends
that failure instead: its status, its `Retry-After`, its JSON body. The engine client reports
both through the `Exchange` it finds in a context variable.
"""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Protocol

from cluster.errors import RequestInvalid
from router.http_errors import HttpFailure

REQUEST_ID_HEADER = "x-request-id"
TRACE_HEADER = "traceparent"
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# A `traceparent` of version 00 has 55.
_MAX_TRACE_CHARS = 128

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Header = tuple[bytes, bytes]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Placed(Protocol):
    """What the layer reads of a request's record."""

    @property
    def prefill_worker(self) -> str | None: ...

    @property
    def decode_worker(self) -> str | None: ...


class Exchange:
    """One HTTP request and response, as the engine client sees it.

    `traceparent` is the client's own trace context, as it sent it. Closing it (client gone, or
    response over) ends every generation that registered with `on_close`, so none outlives its
    client.
    """

    def __init__(self, exchange_id: str, traceparent: str | None = None) -> None:
        self.exchange_id = exchange_id
        self.traceparent = traceparent
        self.has_tokens = False
        self.is_closed = False
        self.failure: HttpFailure | None = None
        self.has_begun = False
        self._num_sequences = 0
        self._closers: set[Callable[[], None]] = set()

    def fail(self, failure: HttpFailure) -> None:
        """Report a failure; the first one is what the client is told."""
        self.failure = self.failure or failure

    @contextmanager
    def running(self, num_sequences: int, at_most: int) -> Iterator[None]:
        """Count sequences while they run; raise `RequestInvalid` instead if they are too many."""
        self._num_sequences += num_sequences
        try:
            if self._num_sequences > at_most:
                raise too_many_sequences(at_most)
            self.has_begun = True
            yield
        finally:
            self._num_sequences -= num_sequences

    def on_close(self, closer: Callable[[], None]) -> None:
        self._closers.add(closer)

    def forget(self, closer: Callable[[], None]) -> None:
        self._closers.discard(closer)

    def close(self) -> None:
        self.is_closed = True
        while self._closers:
            self._closers.pop()()


_current: ContextVar[Exchange] = ContextVar("exchange")


def current_exchange() -> Exchange:
    """Return the exchange of the running request; a fresh one outside any."""
    return _current.get(None) or Exchange(uuid.uuid4().hex)


class ExchangeLayer:
    """Wraps an ASGI app; `record_of` looks a request's record up by its exchange id."""

    def __init__(
        self,
        app: AsgiApp,
        record_of: Callable[[str], Placed | None],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._record_of = record_of
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = _header(scope, REQUEST_ID_HEADER)
        is_valid_id = given_id is not None and _VALID_REQUEST_ID.fullmatch(given_id) is not None
        exchange_id = given_id if given_id and is_valid_id else uuid.uuid4().hex
        trace = _header(scope, TRACE_HEADER)
        # Records keep it.
        is_short = trace is not None and len(trace) <= _MAX_TRACE_CHARS
        exchange = Exchange(exchange_id, trace if is_short else None)
        outlet = _Outlet(exchange, scope, send, self._record_of)
        if given_id is not None and not is_valid_id:
            await outlet.refuse(_bad_request_id())
        elif _content_length(scope) > self._max_body_bytes:
            await outlet.refuse(_body_too_large(self._max_body_bytes))
        else:
            intake = _Intake(exchange, receive, self._max_body_bytes)
            await self._run(_with_request_id(scope, exchange.exchange_id), intake, outlet)

    async def _run(self, scope: Scope, intake: "_Intake", outlet: "_Outlet") -> None:
        token = _current.set(intake.exchange)
        try:
            await self._app(scope, intake.receive, outlet.send)
        finally:
            _current.reset(token)
            intake.exchange.close()
            intake.close()


class _BodyTooLarge(Exception):
    """Stops whoever reads the body; the client gets the failure the exchange carries."""


class _Intake:
    """Passes the request body on up to its limit, then watches for the client leaving.

    The watch is ours because the app's own listeners run only around parts of a request, and
    under ASGI 2.4 a streaming response has none: it notices at its next send.
    """

    def __init__(self, exchange: Exchange, receive: Receive, max_body_bytes: int) -> None:
        self.exchange = exchange
        self._receive = receive
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0
        self._watch: asyncio.Task[None] | None = None
        self._has_left = asyncio.Event()

    async def receive(self) -> Message:
        if self._watch is not None:
            await self._has_left.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._leave()
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_body_bytes:
            self.exchange.fail(_body_too_large(self._max_body_bytes))
            raise _BodyTooLarge
        if not message.get("more_body", False):
            self._watch = asyncio.create_task(self._watch_for_disconnect())
        return message

    async def _watch_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._has_left.set()
        self.exchange.close()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()


class _Outlet:
    """Holds a response until it is known to be the one the client should get."""

    def __init__(
        self,
        exchange: Exchange,
        scope: Scope,
        send: Send,
        record_of: Callable[[str], Placed | None],
    ) -> None:
        self._exchange = exchange
        self._send = send
        self._record_of = record_of
        self._path: str = scope["path"]
        self._is_held = scope["method"] == "POST"
        self._held: list[Message] = []
        self._is_released = False
        self._is_refused = False

    async def send(self, message: Message) -> None:
        if self._is_refused:
            return
        if self._is_released:
            await self._send(message)
            return
        self._held.append(message)
        if message["type"] == "http.response.start":
            return
        if self._exchange.failure is not None:
            await self.refuse(self._exchange.failure)
        elif self._is_final(message):
            await self._release()

    def _is_final(self, message: Message) -> bool:
        return not self._is_held or self._exchange.has_tokens or not message.get("more_body")

    async def _release(self) -> None:
        self._is_released = True
        start = self._held[0]
        start["headers"] = [*start.get("headers", ()), *self._own_headers()]
        for message in self._held:
            await self._send(message)
        self._held.clear()

    async def refuse(self, failure: HttpFailure) -> None:
        """Send `failure` in place of whatever the app answers."""
        self._is_refused = True
        self._held.clear()
        body = failure.body(self._path)
        headers = [
            *failure.headers(),
            (b"content-length", b"%d" % len(body)),
            *self._own_headers(),
        ]
        status = failure.status.value
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _own_headers(self) -> Iterator[Header]:
        yield REQUEST_ID_HEADER.encode(), self._exchange.exchange_id.encode()
        # The client chose the id: before it is let in, another's record may have the same.
        is_known = self._exchange.has_begun
        record = self._record_of(self._exchange.exchange_id) if is_known else None
        if record is not None and record.prefill_worker:
            yield b"x-tandem-prefill-worker", record.prefill_worker.encode()
        if record is not None and record.decode_worker:
            yield b"x-tandem-decode-worker", record.decode_worker.encode()


def too_many_sequences(at_most: int) -> RequestInvalid:
    limit = f"one request may run {at_most} sequences (router.max_sequences)"
    return RequestInvalid(f"{limit}: send fewer prompts, or a smaller n")


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return str(value, "latin-1")
    return None


def _content_length(scope: Scope) -> int:
    text = _header(scope, "content-length") or ""
    # The cut keeps a number of absurd length absurd, and cheap to parse.
    return int(text[:20]) if text.isdecimal() else 0


def _with_request_id(scope: Scope, exchange_id: str) -> Scope:
    """Return `scope` with the id as a header, from which vLLM makes its response ids."""
    name = REQUEST_ID_HEADER.encode()
    others = [(key, value) for key, value in scope["headers"] if key != name]
    return {**scope, "headers": [*others, (name, exchange_id.encode())]}


def _bad_request_id() -> HttpFailure:
    message = f"{REQUEST_ID_HEADER} must be 1 to 128 of: letters, digits, '.', '_', ':', '-'"
    return HttpFailure(HTTPStatus.BAD_REQUEST, "BadRequestError", message, REQUEST_ID_HEADER)


def _body_too_large(max_body_bytes: int) -> HttpFailure:
    message = f"the request body is larger than {max_body_bytes} bytes"
    return HttpFailure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestTooLargeError", message)
