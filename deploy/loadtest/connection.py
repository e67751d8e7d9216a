"""HTTP/1.1 connections that cost little per answer: many streams of small pieces on one core.

One callback parses each piece where it arrives: no task is woken for it and nothing is queued.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

from deploy.access import trust_in

# A server may close an idle connection while a request is on its way to it; its end then comes
# at once. Later ones were given up with a request in hand, and are not sent again.
_STALE_S = 0.1
_CONNECT_TIMEOUT_S = 10.0
# Connections beyond those in use, opened ahead.
_SPARE = 4


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint listens, and the file of its certificate if that is pinned."""

    host: str
    port: int
    is_tls: bool = False
    certificate: str | None = None

    def tls(self) -> ssl.SSLContext | None:
        if not self.is_tls:
            return None
        return trust_in(self.certificate) if self.certificate else ssl.create_default_context()


class Answer(Protocol):
    """Takes one response; exactly one of `on_end` and `on_lost` comes last."""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def on_body(self, data: bytes, now: float) -> None: ...

    def on_end(self) -> None: ...

    def on_lost(self, reason: str) -> None: ...


class Connection(asyncio.Protocol):
    """One connection: idle, or carrying one request."""

    def __init__(self, pool: "ConnectionPool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._request = b""
        self._answer: Answer | None = None
        self._began_at = 0.0
        self._now = 0.0
        self._is_fresh = True
        self._has_bytes = False
        self._headers: dict[bytes, bytes] = {}

    def begin(self, request: bytes, answer: Answer, is_fresh: bool) -> None:
        """Send a request; `is_fresh` if the connection was opened for it."""
        assert self._transport is not None
        self._request, self._answer = request, answer
        self._is_fresh, self._has_bytes = is_fresh, False
        self._headers = {}
        self._began_at = time.monotonic()
        self._transport.write(request)

    def abort(self) -> None:
        self._answer = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        self._has_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lose(f"what came is not HTTP: {error}")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        answer = self._answer
        if answer is None:
            return
        is_stale = not self._is_fresh and not self._has_bytes
        if is_stale and time.monotonic() - self._began_at < _STALE_S:
            self._answer = None
            self._pool.open_for(self._request, answer)
        else:
            self._lose("the endpoint closed the connection" if error is None else str(error))

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.on_head(self._parser.get_status_code(), self._headers)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.on_body(data, self._now)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if self._parser.should_keep_alive():
            self._pool.take_back(self)
        elif self._transport is not None:
            self._transport.close()
        if answer is not None:
            self._pool.settle(answer)
            answer.on_end()

    def _lose(self, reason: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            self._pool.settle(answer)
            answer.on_lost(reason)


class ConnectionPool:
    """Connections to one address: as many as there are requests under way, some warm beyond."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._tls = address.tls()
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._carriers: dict[Answer, Connection | asyncio.Task[None]] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._num_opening_spare = 0

    async def warm(self, count: int) -> None:
        """Open `count` connections; raise `OSError` if the endpoint takes none."""
        opened = await asyncio.gather(*(self._connect() for _ in range(count)))
        # The first may have been closed while the last were still being opened.
        self._idle.extend(connection for connection in opened if connection in self._all)

    def send(self, request: bytes, answer: Answer) -> None:
        """Send on a warm connection, else on one that is opened now."""
        if self._idle:
            connection = self._idle.pop()
            self._carriers[answer] = connection
            connection.begin(request, answer, is_fresh=False)
        else:
            self.open_for(request, answer)
        if len(self._idle) + self._num_opening_spare < _SPARE:
            self._num_opening_spare += 1
            self._start(self._open_spare())

    def cancel(self, answer: Answer) -> None:
        """End a request; nothing more comes to `answer`."""
        carrier = self._carriers.pop(answer, None)
        if isinstance(carrier, Connection):
            carrier.abort()
        elif carrier is not None:
            carrier.cancel()

    def settle(self, answer: Answer) -> None:
        """Let go of an answer that has ended."""
        self._carriers.pop(answer, None)

    def open_for(self, request: bytes, answer: Answer) -> None:
        """Open a connection and send the request on it."""

        async def open_and_send() -> None:
            try:
                connection = await self._connect()
            except OSError as error:
                self.settle(answer)
                answer.on_lost(reason_of(error))
                return
            self._carriers[answer] = connection
            connection.begin(request, answer, is_fresh=True)

        self._carriers[answer] = self._start(open_and_send())

    def take_back(self, connection: Connection) -> None:
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in list(self._all):
            connection.abort()
        # Transports close in the loop's next round.
        await asyncio.sleep(0)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                lambda: Connection(self), self._address.host, self._address.port, ssl=self._tls
            )
        self._all.add(connection)
        return connection

    async def _open_spare(self) -> None:
        try:
            # A request that needs one says what is wrong.
            with contextlib.suppress(OSError):
                self._idle.append(await self._connect())
        finally:
            self._num_opening_spare -= 1

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return task


def reason_of(error: OSError) -> str:
    """Return why no connection came about, in a few words."""
    if isinstance(error, TimeoutError):
        return f"no connection within {_CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
