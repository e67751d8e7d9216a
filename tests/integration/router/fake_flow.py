"""A flow that answers from a fixed text, and fails, waits or hangs where a test says."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.messages import PrefillStats, Tokens
from cluster.names import FinishReason
from router.flow import GenerateRequest

PREFILL_WORKER, DECODE_WORKER = "prefill-7", "decode-9"
REUSED_TOKENS = 3


@dataclass
class FakeRecord:
    prefill_worker: str | None = PREFILL_WORKER
    decode_worker: str | None = DECODE_WORKER


@dataclass
class FakeFlow:
    """`answer` is the whole output; `fail_at` and `hang_at` count the tokens sent before."""

    answer: tuple[int, ...]
    failure: Exception | None = None
    fail_at: int = 0
    hang_at: int | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    records: dict[str, FakeRecord] = field(default_factory=dict)

    def reset(self) -> None:
        self.failure, self.fail_at, self.hang_at = None, 0, None
        self.requests.clear()
        self.endings.clear()
        self.records.clear()

    async def serve(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]:
        self.requests.append(request)
        self.records[request.exchange_id] = FakeRecord()
        ending = "error"
        try:
            async for tokens in self._tokens(request):
                yield tokens
            ending = "finished"
        except asyncio.CancelledError:
            ending = "cancelled"
            raise
        except GeneratorExit:
            ending = "closed"
            raise
        finally:
            self.endings.append(ending)

    async def _tokens(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]:
        max_tokens = int(str(request.sampling.get("max_tokens", 16)))
        answer = (self.answer * max_tokens)[:max_tokens]
        for index, token_id in enumerate(answer):
            await self._misbehave(index)
            yield Tokens(
                request.request_id,
                (token_id,),
                finish_reason=FinishReason.LENGTH if index + 1 == len(answer) else None,
                logprobs=_logprobs(request.sampling.get("logprobs"), [token_id]),
                prompt_logprobs=_prompt_logprobs(request) if index == 0 else None,
                stats=_stats(len(request.prompt_token_ids)) if index == 0 else None,
            )
            await asyncio.sleep(0)

    async def _misbehave(self, num_sent: int) -> None:
        if self.failure is not None and num_sent == self.fail_at:
            raise self.failure
        if num_sent == self.hang_at:
            await asyncio.Event().wait()


def _stats(num_prompt_tokens: int) -> PrefillStats:
    reused = min(REUSED_TOKENS, num_prompt_tokens - 1)
    return PrefillStats(num_prompt_tokens, 1, reused, num_prompt_tokens - 1 - reused)


def _logprobs(num_alternatives: Any, token_ids: list[int]) -> Mapping[str, object] | None:
    """Rows of the chosen token, then alternatives 100, 101, ... each less likely."""
    if num_alternatives is None:
        return None
    others = list(range(100, 100 + num_alternatives))
    return {
        "token_ids": [[token_id, *others] for token_id in token_ids],
        "logprobs": [[-0.5, *(-1.0 - other / 100 for other in others)] for _ in token_ids],
        "ranks": [1 for _ in token_ids],
    }


def _prompt_logprobs(request: GenerateRequest) -> Mapping[str, object] | None:
    number = request.sampling.get("prompt_logprobs")
    return _logprobs(number, list(request.prompt_token_ids[1:]))
