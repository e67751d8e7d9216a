"""The words of a load test: what is sent, what came back, and the document of a run. Pure.

Two parts meet here. Workloads make the sends::

    deploy.loadtest.workload.build(spec: WorkloadSpec, tokenizer: Tokenizer, context: int,
                                   rng: Random) -> list[Send]       # sorted by `at_s`
    deploy.loadtest.report.page(runs: Sequence[Mapping[str, Any]]) -> str    # HTML

The client turns sends into records, and `document.py` turns records into a run document, a JSON
object that `page` draws (one run: its report; several: their comparison):

format       "tandem-loadtest-1"
label        what the run is called in a comparison (`--label`; default: the endpoint)
started_at   ISO 8601 in UTC; every other time is in seconds after the run's zero, `Send.at_s`'s
state        "complete", "interrupted" (by a signal), "broken" (the endpoint stopped answering, or
             a search could not go on)
workload     {"spec", "time_scale", "rate_scale", "length_scale", "requests", "duration_s",
             "prompt_tokens", "output_tokens", "seed"}: as asked and as built
endpoint     {"url", "model", "api": "completions" | "chat", "context_tokens"}
settings     {"mode": "open" | "closed", "concurrency": int | null, "slo_ttft_s", "slo_tpot_s",
             "worker_hour_price": float | null, "verify": path | null}
scheduling   {"p50_s", "p99_s", "max_s", "limit_s", "kept_up"}: sent - scheduled, over all
             requests; a run whose client did not keep up says nothing about the endpoint
summary      see below, over the whole run
phases       [{"name", "begin_s", "end_s", "summary"}], in order; empty if there is one phase
pools        [[t_s, prefill workers, decode workers], ...], one a second, empty where the
             endpoint does not say (null for a pool it does not have)
faults       ["request 17, at 3.2 s: HTTP 503: ...", ...], what makes the exit status 1
requests     one object per send, see below
probes       only with --find-goodput: [{"rate", "attainment", "met", "requests", "low", "high",
             "verdict": "met" | "missed" | "open", "is_cut", "summary"}], as measured; "goodput":
             {"rate", "bound", "why"}, null if no rate was met before the search ended early,
             stands beside it and `requests` are the best met probe's

A summary (`measures.summarise`): {"requests", "completed", "lost", "truncated", "wrong",
"duration_s", "offered_rate", "request_rate", "output_token_rate", "prompt_token_rate",
"ttft_s", "tpot_s", "itl_s", "e2e_s", "normalised_s", "slo": {"attainment", "ttft_attainment",
"tpot_attainment", "goodput"}, "fluidity": {"index", "mean", "p10"},
"worker_seconds": {"prefill", "decode", "total"} | null, "cost": float | null}.
The five latencies are {"mean", "p50", "p90", "p95", "p99", "max"}, or null if none was seen.
Rates are per second; `goodput` is requests per second that met both objectives.

A request (`RequestRecord.document`): {"index", "phase", "session", "turn", "scheduled_s", "sent_s",
"end_s", "prompt_tokens", "output_tokens" (both as asked), "counted_prompt_tokens" (the
server's count, null if it gives none), "received_tokens", "token_s": [when each answer with
tokens came], "token_counts": [tokens received by then], "ttft_s", "tpot_s", "e2e_s" (each null
if not reached), "met" (both objectives), "outcome", "error": text | null, "id": the endpoint's
name for it | null}.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

FORMAT = "tandem-loadtest-1"


class Tokenizer(Protocol):
    """The served model's own; neither direction adds or drops special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What is asked for: `--workload` and the flags that scale it.

    `text` is "KIND" or "KIND:ARGUMENTS". Arrivals come `time_scale` times as fast, with the
    same requests; `rate_scale` thins or multiplies the requests within unchanged time; lengths
    are multiplied by `length_scale`, None: only as far down as the model's context demands.
    At most the first `num_requests`, and those of the first `duration_s` seconds as sent, go out.
    """

    text: str
    time_scale: float = 1.0
    rate_scale: float = 1.0
    length_scale: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """One request, due `at_s` seconds after the run's start.

    `prompt_token_ids` go out as they are; for an endpoint that takes text their decoded text
    does. `output_tokens` is exactly how many tokens the endpoint shall answer with. Turns of
    one `session` share their beginning: each prompt contains the last one, and an answer's
    stand-in after it; it is due `think_s` after the answer of the turn before ended, and not
    before `at_s`. `phase` names the part of the run, "" if it has none.
    """

    at_s: float
    prompt_token_ids: tuple[int, ...]
    output_tokens: int
    session: str | None = None
    turn: int = 0
    think_s: float = 0.0
    phase: str = ""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class Outcome(StrEnum):
    """What became of a request; only `COMPLETED` is no fault of the run."""

    COMPLETED = "completed"
    LOST = "lost"  # refused, broken off, timed out
    TRUNCATED = "truncated"  # ended properly with fewer tokens than asked, or more
    WRONG = "wrong"  # other prompt tokens counted, or another answer than the reference
    UNFINISHED = "unfinished"  # the run was interrupted meanwhile: neither good nor bad


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it. Times are seconds after the run's start.

    `token_s[i]` is when an answer came after which `token_counts[i]` tokens were there: one
    answer may carry several.
    """

    index: int
    send: Send
    scheduled_s: float
    sent_s: float | None = None
    end_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    received_tokens: int = 0
    counted_prompt_tokens: int | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    id: str | None = None
    outcome: Outcome = Outcome.UNFINISHED
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from when it was due, so a late client counts as a slow endpoint."""
        return self.token_s[0] - self.scheduled_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first answer; None for answers all in one."""
        if not self.token_s or self.token_counts[-1] == self.token_counts[0]:
            return None
        span_s = self.token_s[-1] - self.token_s[0]
        return span_s / (self.token_counts[-1] - self.token_counts[0])

    @property
    def e2e_s(self) -> float | None:
        """Seconds from when it was due to the last token."""
        return self.token_s[-1] - self.scheduled_s if self.token_s else None

    @property
    def is_completed(self) -> bool:
        return self.outcome is Outcome.COMPLETED


@dataclass(frozen=True, slots=True)
class Slo:
    """The objectives a request must meet to count as good, in seconds; None: not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, record: RequestRecord) -> tuple[bool, bool]:
        """Return whether it met the objectives for TTFT and TPOT; a lost one meets neither."""
        if not record.is_completed:
            return False, False
        ttft_s, tpot_s = record.ttft_s, record.tpot_s
        return (
            self.ttft_s is None or (ttft_s is not None and ttft_s <= self.ttft_s),
            # An answer that came in one piece kept nobody waiting between tokens.
            self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s,
        )


Document = dict[str, Any]
