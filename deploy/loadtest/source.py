"""A bare source of streamed completions with fixed timing: what the client is measured against.

    python -m deploy.loadtest.source --port 9000 --ttft 0.05 --itl 0.01

It has no engine and no queue: every request's first token comes `ttft_s` after it arrived and each
further one `itl_s` later. The text follows from the prompt, so answers can be compared. On request
it misbehaves, so that what the client makes of it can be tested.
"""

import argparse
import asyncio
import heapq
import signal
import time
import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import httptools
import msgspec
import uvloop

from deploy.loadtest.timer import PreciseTimer

MODEL = "bare"
_CONTEXT = 131_072
_WORDS = (" a", " the", " of", " and", " to", " in", " is", " it")
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\nx-request-id: %b\r\n\r\n"
)


class Fault(StrEnum):
    """How the source misbehaves, after `fault_after` tokens."""

    CLOSE = "close"  # the connection breaks
    TRUNCATE = "truncate"  # the stream ends properly, too soon
    STALL = "stall"  # nothing more comes
    ERROR = "error"  # an error instead of a token
    GARBAGE = "garbage"  # an answer that is no JSON
    REFUSE = "refuse"  # status 503, before any token
    OTHER = "other"  # another text than the prompt's


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Seconds to the first token and between tokens; every `fault_every`th request fails so."""

    ttft_s: float = 0.05
    itl_s: float = 0.01
    fault: Fault | None = None
    fault_every: int = 1
    fault_after: int = 0


class _Body(msgspec.Struct):
    max_tokens: int = 16
    prompt: Any = None
    messages: Any = None


_decode = msgspec.json.Decoder(_Body).decode


class _Stream:
    """One answer under way."""

    __slots__ = ("connection", "due", "fault", "ident", "is_chat", "num_prompt", "sent", "total")

    def __init__(self, connection: "_Session", body: _Body, ident: str, is_chat: bool) -> None:
        self.connection = connection
        self.ident = ident
        self.is_chat = is_chat
        self.num_prompt = len(body.prompt) if isinstance(body.prompt, list) else 1
        self.total = body.max_tokens
        self.sent = 0
        self.due = 0.0
        self.fault: Fault | None = None

    def chunk(self, seed: int) -> bytes:
        """Return the next token as an event."""
        self.sent += 1
        word = _WORDS[(seed * 31 + self.sent * 7) % 8]
        choice = f'"delta":{{"content":"{word}"}}' if self.is_chat else f'"text":"{word}"'
        return (
            f'data: {{"id":"{self.ident}","model":"{MODEL}","choices":[{{"index":0,{choice},'
            f'"logprobs":null,"finish_reason":null}}],"usage":{{"prompt_tokens":{self.num_prompt},'
            f'"completion_tokens":{self.sent},"total_tokens":{self.num_prompt + self.sent}}}}}\n\n'
        ).encode()


class Source:
    """The server: one heap of tokens that are due, one timer."""

    def __init__(self, plan: SourcePlan) -> None:
        self._plan = plan
        self._due: list[tuple[float, int, _Stream]] = []
        self._num_pushed = 0
        self.num_requests = 0
        self._timer: PreciseTimer | None = None
        self._server: asyncio.Server | None = None
        self.sessions: set[_Session] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        loop = asyncio.get_running_loop()
        self._timer = PreciseTimer(loop, self._send_due)
        self._server = await loop.create_server(lambda: _Session(self), host, port, backlog=1024)
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def stop(self) -> None:
        """Break every connection and stop listening."""
        assert self._timer is not None and self._server is not None
        self._server.close()
        for session in list(self.sessions):
            session.abort()
        self._due.clear()
        self._timer.close()
        await asyncio.sleep(0)

    def take(self, session: "_Session", path: bytes, body: bytes) -> None:
        """Answer one request."""
        if path == b"/v1/models":
            model = {"id": MODEL, "object": "model", "max_model_len": _CONTEXT}
            session.answer(200, {"object": "list", "data": [model]})
        elif path == b"/health":
            session.answer(200, {})
        elif path in (b"/v1/completions", b"/v1/chat/completions"):
            self._complete(session, path, body)
        else:
            session.answer(404, {"error": {"message": f"{path.decode()} is not served"}})

    def _complete(self, session: "_Session", path: bytes, body: bytes) -> None:
        now = time.monotonic()
        try:
            asked = _decode(body)
        except msgspec.MsgspecError as error:
            session.answer(400, {"error": {"message": str(error)}})
            return
        self.num_requests += 1
        plan = self._plan
        is_faulty = plan.fault is not None and self.num_requests % plan.fault_every == 0
        if is_faulty and plan.fault is Fault.REFUSE:
            session.answer(503, {"error": {"message": "no room"}})
            return
        stream = _Stream(session, asked, f"bare-{self.num_requests}", b"chat" in path)
        stream.fault = plan.fault if is_faulty else None
        prompt = asked.prompt if asked.prompt is not None else asked.messages
        session.begin(stream, zlib.crc32(msgspec.json.encode(prompt)))
        self._push(stream, now + plan.ttft_s)

    def _push(self, stream: _Stream, due: float) -> None:
        stream.due = due
        self._num_pushed += 1
        heapq.heappush(self._due, (due, self._num_pushed, stream))
        if self._due[0][2] is stream:
            assert self._timer is not None
            self._timer.arm(due)

    def _send_due(self) -> None:
        due, now = self._due, time.monotonic()
        while due and due[0][0] <= now:
            stream = heapq.heappop(due)[2]
            if stream.connection.advance(stream, self._plan.fault_after):
                self._num_pushed += 1
                stream.due += self._plan.itl_s
                heapq.heappush(due, (stream.due, self._num_pushed, stream))
        if due:
            assert self._timer is not None
            self._timer.arm(due[0][0])


class _Session(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._path = b""
        self._body = b""
        self._seed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._source.sessions.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._source.sessions.discard(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._source.take(self, self._path.partition(b"?")[0], self._body)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def answer(self, status: int, document: object) -> None:
        """Send a whole response."""
        if self._transport is None:
            return
        body = msgspec.json.encode(document)
        head = f"HTTP/1.1 {status} x\r\ncontent-type: application/json\r\n"
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def begin(self, stream: _Stream, seed: int) -> None:
        """Send a streamed response's head."""
        self._seed = seed + (stream.fault is Fault.OTHER)
        if self._transport is not None:
            self._transport.write(_STREAM_HEAD % stream.ident.encode())

    def advance(self, stream: _Stream, fault_after: int) -> bool:
        """Send the next token; return whether more are to come."""
        if self._transport is None:
            return False
        if stream.fault not in (None, Fault.OTHER) and stream.sent >= fault_after:
            self._misbehave(stream.fault)
            return False
        self._write(stream.chunk(self._seed))
        if stream.sent < stream.total:
            return True
        self._end()
        return False

    def _misbehave(self, fault: Fault | None) -> None:
        if fault is Fault.CLOSE:
            self.abort()
        elif fault is Fault.TRUNCATE:
            self._end()
        elif fault is Fault.ERROR:
            self._write(b'data: {"error":{"message":"the engine died","code":500}}\n\n')
            self._end()
        elif fault is Fault.GARBAGE:
            self._write(b'data: {"choices": [{]}\n\n')
            self._end()

    def _end(self) -> None:
        self._write(b"data: [DONE]\n\n")
        if self._transport is not None:
            self._transport.write(b"0\r\n\r\n")

    def _write(self, event: bytes) -> None:
        if self._transport is not None:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))


async def _serve(plan: SourcePlan, host: str, port: int) -> None:
    source = Source(plan)
    number = await source.start(host, port)
    print(f"http://{host}:{number}", flush=True)
    over = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, over.set)
    await over.wait()
    await source.stop()


def main() -> int:
    """Serve until SIGINT or SIGTERM; the first line of output is the URL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--ttft", type=float, default=0.05, metavar="S")
    parser.add_argument("--itl", type=float, default=0.01, metavar="S")
    parser.add_argument("--fault", type=Fault, choices=list(Fault))
    parser.add_argument("--fault-every", type=int, default=1, metavar="N")
    parser.add_argument("--fault-after", type=int, default=0, metavar="TOKENS")
    flags = parser.parse_args()
    plan = SourcePlan(flags.ttft, flags.itl, flags.fault, flags.fault_every, flags.fault_after)
    uvloop.run(_serve(plan, flags.host, flags.port))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
