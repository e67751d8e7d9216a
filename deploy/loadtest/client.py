"""The one client: streams completions, times every token where it arrives.

`Client` sends what it is given when it is told to; `pace.py` tells it when.
"""

import asyncio
import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from cluster.errors import Unavailable
from deploy.loadtest.connection import ConnectionPool, reason_of
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.sse import AnswerStream
from deploy.loadtest.words import Outcome, RequestRecord

_SHOWN = 300
_SWEEP_S = 0.25

Done = Callable[[RequestRecord], None]


class _Completion:
    """A request under way: takes the response's pieces and fills the record."""

    __slots__ = ("_client", "_done", "_is_ok", "_refusal", "_status", "_stream", "record")

    def __init__(self, client: "Client", record: RequestRecord, done: Done) -> None:
        self.record = record
        self._client = client
        self._done = done
        self._stream = AnswerStream(record, client.keeps_text)
        self._status = 0
        self._is_ok = False
        self._refusal = b""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status, self._is_ok = status, status == 200
        ident = headers.get(b"x-request-id")
        self.record.id = ident.decode(errors="replace") if ident is not None else None

    def on_body(self, data: bytes, now: float) -> None:
        self._client.failing_since = None
        if self._is_ok:
            self._stream.feed(data, now - self._client.zero)
        elif len(self._refusal) < _SHOWN:
            self._refusal += data

    def on_end(self) -> None:
        if not self._is_ok:
            text = self._refusal[:_SHOWN].decode(errors="replace")
            self.settle(f"HTTP {self._status}: {' '.join(text.split())}")
        elif not self._stream.is_done:
            self.settle("the stream ended without its [DONE]")
        else:
            self.settle(None)

    def on_lost(self, reason: str) -> None:
        # Some servers end the connection with the answer.
        if self._is_ok and self._stream.is_done:
            self.settle(None)
        elif self.record.received_tokens:
            self.settle(f"broke off after {self.record.received_tokens} tokens: {reason}")
        else:
            self.settle(reason)

    def settle(self, error: str | None) -> None:
        """Write down what became of the request."""
        record = self.record
        record.error = record.error or error
        record.end_s = time.monotonic() - self._client.zero
        record.outcome, record.error = _judged(record, self._client.counts_prompts)
        self._client.settled(self, error is None or self._status != 0)
        self._done(record)


def _judged(record: RequestRecord, counts_prompts: bool) -> tuple[Outcome, str | None]:
    send = record.send
    if record.error is not None:
        return Outcome.LOST, record.error
    if record.received_tokens != send.output_tokens:
        return Outcome.TRUNCATED, f"{record.received_tokens} of {send.output_tokens} tokens"
    counted = record.counted_prompt_tokens
    if counts_prompts and counted is not None and counted != send.prompt_tokens:
        return Outcome.WRONG, f"{counted} prompt tokens counted, {send.prompt_tokens} sent"
    return Outcome.COMPLETED, None


class _Document:
    """Takes a whole small response."""

    def __init__(self) -> None:
        self.future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = b""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status

    def on_body(self, data: bytes, now: float) -> None:
        self._body += data

    def on_end(self) -> None:
        if not self.future.done():
            self.future.set_result((self._status, self._body))

    def on_lost(self, reason: str) -> None:
        if not self.future.done():
            self.future.set_exception(Unavailable(reason))


class Client:
    """Streams completions from one endpoint, as many at once as are begun.

    Times in records are seconds after `zero`, a moment of `time.monotonic`. A text is kept only
    with `keeps_text`: it costs time for every token. `failing_since` is when the first request
    failed after anything was last answered; None if none did.
    """

    def __init__(
        self, endpoint: Endpoint, timeout_s: float = 600.0, keeps_text: bool = False
    ) -> None:
        self.endpoint = endpoint
        self.keeps_text = keeps_text
        self.zero = time.monotonic()
        self.failing_since: float | None = None
        self._failed_at = 0.0
        # A chat template adds tokens to the prompt.
        self.counts_prompts = endpoint.api == "completions"
        self._timeout_s = timeout_s
        self._pool = ConnectionPool(endpoint.address)
        self._under_way: dict[_Completion, float] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._sweep_soon()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self.abandon()
        await self._pool.close()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def num_tokens_under_way(self) -> int:
        return sum(each.record.received_tokens for each in self._under_way)

    @property
    def failing_s(self) -> float:
        """Seconds from the first failure to the last one, with nothing answered since."""
        return 0.0 if self.failing_since is None else self._failed_at - self.failing_since

    async def warm(self, count: int) -> None:
        """Open connections ahead; raise `Unavailable` if the endpoint takes none."""
        try:
            await self._pool.warm(count)
        except OSError as error:
            raise Unavailable(f"{self.endpoint.url}: {reason_of(error)}") from None

    def begin(self, record: RequestRecord, request: bytes, done: Done) -> None:
        """Send `request`; call `done` once with the finished record."""
        completion = _Completion(self, record, done)
        now = time.monotonic()
        self._under_way[completion] = now
        record.sent_s = now - self.zero
        self._pool.send(request, completion)

    async def complete(self, record: RequestRecord, request: bytes) -> RequestRecord:
        """Send `request` and return the record once it is finished."""
        future: asyncio.Future[RequestRecord] = asyncio.get_running_loop().create_future()

        def done(record: RequestRecord) -> None:
            if not future.done():
                future.set_result(record)

        self.begin(record, request, done)
        return await future

    async def read(self, path: str, timeout_s: float = 10.0) -> Any:
        """Return the JSON at `path`, None if the endpoint has none there.

        Raise `Unavailable` if it does not answer in time.
        """
        document = _Document()
        self._pool.send(self.endpoint.get(path), document)
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await document.future
        except TimeoutError:
            self._pool.cancel(document)
            raise Unavailable(f"{path}: no answer within {timeout_s:g} s") from None
        try:
            return json.loads(body) if status == 200 else None
        except ValueError:
            return None

    def abandon(self) -> None:
        """End what is under way; its records stay unfinished."""
        for completion in list(self._under_way):
            self._pool.cancel(completion)
        self._under_way.clear()

    def settled(self, completion: _Completion, has_answered: bool) -> None:
        self._under_way.pop(completion, None)
        if has_answered:
            self.failing_since = None
            return
        self._failed_at = time.monotonic()
        if self.failing_since is None:
            self.failing_since = self._failed_at

    def _sweep_soon(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(_SWEEP_S, self._end_overdue)

    def _end_overdue(self) -> None:
        """End requests past their time: they stand in the order in which they were sent."""
        latest = time.monotonic() - self._timeout_s
        overdue = []
        for completion, sent_at in self._under_way.items():
            if sent_at > latest:
                break
            overdue.append(completion)
        for completion in overdue:
            self._pool.cancel(completion)
            completion.settle(f"no end within {self._timeout_s:g} s")
        self._sweep_soon()
