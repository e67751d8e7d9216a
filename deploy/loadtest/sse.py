"""Server-sent events of a streamed completion, decoded into a request's record. Pure.

Decoding goes by type: a field that is not needed costs nothing, and one of another type is named.
"""

import json
from typing import Any

import msgspec

from deploy.loadtest.words import RequestRecord

_DONE = b"[DONE]"
_SHOWN = 300


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class AnswerStream:
    """Takes one answer's body as it comes, in pieces of any size.

    Tokens are counted by what the endpoint says it has produced, where each answer says that;
    else by token ids; else an answer with text is one token, and the last usage corrects it.
    """

    __slots__ = ("_keeps_text", "_rest", "is_done", "record")

    def __init__(self, record: RequestRecord, keeps_text: bool) -> None:
        self.record = record
        self.is_done = False
        self._keeps_text = keeps_text
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take a piece of the body that came `now_s` after the run's start."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == _DONE:
            self.is_done = True
            return
        try:
            chunk = _decode(payload)
        except msgspec.MsgspecError as error:
            shown = payload[:_SHOWN].decode(errors="replace")
            self.record.error = self.record.error or f"an answer is not one: {error}: {shown}"
            return
        if chunk.error is not None:
            shown = json.dumps(chunk.error)[:_SHOWN]
            self.record.error = self.record.error or f"the endpoint says: {shown}"
            return
        self._count(chunk, now_s)
        if self._keeps_text:
            self._keep(chunk)

    def _count(self, chunk: _Chunk, now_s: float) -> None:
        record, usage = self.record, chunk.usage
        if usage is not None and usage.prompt_tokens is not None:
            record.counted_prompt_tokens = usage.prompt_tokens
        if chunk.choices:
            count = (
                usage.completion_tokens
                if usage is not None
                else record.received_tokens + sum(map(_tokens_in, chunk.choices))
            )
            if count > record.received_tokens:
                record.received_tokens = count
                record.token_s.append(now_s)
                record.token_counts.append(count)
        elif usage is not None and record.token_counts:
            record.received_tokens = record.token_counts[-1] = usage.completion_tokens

    def _keep(self, chunk: _Chunk) -> None:
        for choice in chunk.choices:
            self.record.text += choice.text or _text_of(choice.delta)
            self.record.token_ids += choice.token_ids or ()


def _tokens_in(choice: _Choice) -> int:
    if choice.token_ids is not None:
        return len(choice.token_ids)
    return 1 if choice.text or _text_of(choice.delta) else 0


def _text_of(delta: _Delta | None) -> str:
    return (delta.content or delta.reasoning_content or "") if delta is not None else ""
