"""What became of every request: one record per sampled sequence, looked up by exchange. Pure.

Records of requests in flight are always kept, finished ones up to a bound, oldest out first.
"""

import enum
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from cluster.messages import PrefillStats, Receipt
from cluster.names import FinishReason, RequestId, Stage, WorkerId
from router.policy import Placed
from router.recovery import Cause
from router.timeline import Event, Timeline


class Outcome(enum.StrEnum):
    """How a request ended; the first three are the client's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    INVALID = "invalid"
    DEADLINE = "deadline"
    ERROR = "error"

    @classmethod
    def of(cls, reason: FinishReason) -> "Outcome":
        """Return the outcome of a finish that reaches the client; others are errors."""
        return cls(reason.value) if reason.value in set(cls) else cls.ERROR

    @property
    def is_success(self) -> bool:
        return self in (Outcome.STOP, Outcome.LENGTH, Outcome.REPETITION)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One placement tried, and what it came to nothing for."""

    placement: Placed
    cause: Cause | None = None
    detail: str | None = None

    def as_document(self) -> dict[str, object]:
        return {
            "prefill_worker": self.placement.prefill_worker,
            "decode_worker": self.placement.decode_worker,
            "reason": self.placement.reason,
            "cause": self.cause and self.cause.value,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Where decode got the prompt's tokens from, by the decode engine's own count.

    `recomputed` ones were to be received, `local` ones were decode's to compute.
    """

    transferred: int = 0
    reused: int = 0
    recomputed: int = 0
    local: int = 0

    @classmethod
    def of(cls, stats: PrefillStats, expects_handoff: bool) -> "PromptTokens":
        return cls(
            transferred=stats.num_transferred_tokens,
            reused=stats.num_local_cached_tokens,
            recomputed=stats.num_computed_tokens if expects_handoff else 0,
            local=0 if expects_handoff else stats.num_computed_tokens,
        )

    def as_document(self) -> dict[str, int]:
        return {
            "transferred": self.transferred,
            "reused": self.reused,
            "recomputed": self.recomputed,
            "local": self.local,
        }


@dataclass(slots=True)
class RequestRecord:
    """One sampled sequence's way through the pools."""

    exchange_id: str
    request_id: RequestId
    num_prompt_tokens: int
    timeline: Timeline
    attempts: list[Attempt] = field(default_factory=list)
    prompt_tokens: PromptTokens | None = None
    receipt: Receipt | None = None
    outcome: Outcome | None = None
    error: str | None = None
    traceparent: str | None = None

    @property
    def stage(self) -> Stage:
        return self.timeline.stage

    @property
    def prefill_worker(self) -> WorkerId | None:
        """The prefill worker of the latest attempt; None also for a local prefill."""
        return self.attempts[-1].placement.prefill_worker if self.attempts else None

    @property
    def decode_worker(self) -> WorkerId | None:
        return self.attempts[-1].placement.decode_worker if self.attempts else None

    @property
    def bytes_agree(self) -> bool | None:
        """Whether decode received what prefill says it sent; None if nothing was pulled."""
        receipt = self.receipt
        return None if receipt is None else receipt.received_bytes == receipt.produced_bytes

    def record_placed(self, placement: Placed, now: float) -> None:
        self.attempts.append(Attempt(placement))
        self.timeline.stamp(Event.PLACED, now)

    def record_setback(self, cause: Cause, detail: str, now: float) -> None:
        """Note why the latest attempt came to nothing."""
        self.attempts[-1] = replace(self.attempts[-1], cause=cause, detail=detail)
        self.timeline.stamp(Event.SET_BACK, now)

    def as_document(self) -> dict[str, object]:
        return {
            "request_id": self.request_id,
            "stage": self.stage.value,
            "outcome": self.outcome and self.outcome.value,
            "error": self.error,
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
            "attempts": [attempt.as_document() for attempt in self.attempts],
            "num_prompt_tokens": self.num_prompt_tokens,
            "prompt_tokens": self.prompt_tokens and self.prompt_tokens.as_document(),
            "received_bytes": self.receipt and self.receipt.received_bytes,
            "produced_bytes": self.receipt and self.receipt.produced_bytes,
            "bytes_agree": self.bytes_agree,
            "pull_s": self.receipt and self.receipt.transfer_s,
            "transport": self.receipt and self.receipt.transport,
            **self.timeline.as_document(),
        }


@dataclass(slots=True)
class ExchangeRecord:
    """What one client request became: a record per prompt and sampled sequence."""

    exchange_id: str
    sequences: list[RequestRecord] = field(default_factory=list)

    def as_document(self) -> dict[str, object]:
        sequences = [record.as_document() for record in self.sequences]
        return {"exchange_id": self.exchange_id, "sequences": sequences}


class Records:
    """The records in flight and the last `limit` finished ones, with totals over all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._exchanges: dict[str, ExchangeRecord] = {}
        self._open: dict[int, RequestRecord] = {}
        self._finished: deque[RequestRecord] = deque()
        self._outcomes: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter(received=0, produced=0, mismatches=0)

    def __repr__(self) -> str:
        return f"<Records open={len(self._open)} finished={len(self._finished)}>"

    def open(
        self, exchange_id: str, request_id: RequestId, num_prompt_tokens: int, now: float
    ) -> RequestRecord:
        """Return the record of a request that arrives."""
        record = RequestRecord(exchange_id, request_id, num_prompt_tokens, Timeline(now))
        exchange = self._exchanges.setdefault(exchange_id, ExchangeRecord(exchange_id))
        exchange.sequences.append(record)
        self._open[id(record)] = record
        return record

    def finish(
        self, record: RequestRecord, outcome: Outcome, error: str | None, now: float
    ) -> None:
        """Close the record; how it ended first stands."""
        if self._open.pop(id(record), None) is None:
            return
        record.outcome, record.error = outcome, error
        record.timeline.stamp(Event.FINISHED, now)
        self._add_up(record, outcome)
        self._finished.append(record)
        while len(self._finished) > self._limit:
            self._forget(self._finished.popleft())

    def get(self, exchange_id: str) -> ExchangeRecord | None:
        """Return the exchange's record if it is in flight or not yet forgotten."""
        return self._exchanges.get(exchange_id)

    def latest(self, num: int) -> Iterator[RequestRecord]:
        """Yield the records in flight, then the finished ones, newest first.

        Those in flight take at most half of `num` places, and what finished ones leave.
        """
        num_open = max(num // 2, num - len(self._finished))
        page = list(islice(reversed(self._open.values()), num_open))
        page += islice(reversed(self._finished), num - len(page))
        yield from page

    def totals(self) -> dict[str, object]:
        """Return sums over every request since the start, and the stages of those in flight."""
        stages = Counter(record.stage.value for record in self._open.values())
        return {
            "open": dict(stages),
            "outcomes": dict(self._outcomes),
            "setbacks": dict(self._causes),
            "prompt_tokens": dict(self._prompt_tokens),
            "handoff_bytes": dict(self._bytes),
        }

    def _add_up(self, record: RequestRecord, outcome: Outcome) -> None:
        self._outcomes[outcome.value] += 1
        self._causes.update(attempt.cause.value for attempt in record.attempts if attempt.cause)
        if record.prompt_tokens is not None:
            self._prompt_tokens.update(record.prompt_tokens.as_document())
        if record.receipt is not None:
            self._bytes["received"] += record.receipt.received_bytes
            self._bytes["produced"] += record.receipt.produced_bytes
            self._bytes["mismatches"] += record.bytes_agree is False

    def _forget(self, record: RequestRecord) -> None:
        exchange = self._exchanges[record.exchange_id]
        exchange.sequences = [other for other in exchange.sequences if other is not record]
        if not exchange.sequences:
            del self._exchanges[record.exchange_id]
