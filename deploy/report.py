"""What a replay came to: sums, percentiles, and what is wrong with it. Pure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Decode recomputes the last prompt token to sample from; more means its KV cache did not arrive.
_MAX_RECOMPUTED = 1


@dataclass(slots=True)
class Replayed:
    """One request as the client saw it, and the router's record of it.

    `token_times` is when answers with tokens came, `token_counts` the tokens received by then.
    """

    prompt_tokens: int
    output_tokens: int
    scheduled_at: float
    token_times: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    received_tokens: int = 0
    is_over: bool = False
    error: str | None = None
    record: Mapping[str, Any] | None = None

    @property
    def fault(self) -> str | None:
        """Return why the request counts as lost, None if it was served in full."""
        if self.error is not None:
            return self.error
        if self.received_tokens != self.output_tokens:
            return f"{self.received_tokens} of {self.output_tokens} tokens"
        return None

    @property
    def ttft_s(self) -> float:
        """Seconds from when it should have been sent, so a late client counts as slow."""
        return self.token_times[0] - self.scheduled_at

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.token_times)]

    def record_sum(self, *path: str) -> int:
        """Add up one figure over the record's sequences; absent ones count as nothing."""
        total = 0
        for sequence in (self.record or {}).get("sequences", []):
            value: Any = sequence
            for key in path:
                value = (value or {}).get(key)
            total += value or 0
        return total


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def faults(replayed: Sequence[Replayed]) -> list[str]:
    """Return everything that makes the run a failure, one line each."""
    lines = [f"request {i}: {r.fault}" for i, r in enumerate(replayed) if r.fault is not None]
    for index, request in enumerate(replayed):
        recomputed = request.record_sum("prompt_tokens", "recomputed")
        if recomputed > _MAX_RECOMPUTED:
            lines.append(f"request {index}: decode recomputed {recomputed} prompt tokens")
        if request.fault is None and request.record is None:
            lines.append(f"request {index}: the router has no record of it")
    return lines


def rows(replayed: Sequence[Replayed], duration_s: float) -> list[tuple[str, str]]:
    """Return the report as (what, figure)."""
    served = [request for request in replayed if request.fault is None]
    output_tokens = sum(request.received_tokens for request in replayed)
    prompt_tokens = sum(request.prompt_tokens for request in served)
    received, produced = (
        sum(request.record_sum(name) for request in replayed)
        for name in ("received_bytes", "produced_bytes")
    )
    origins = ("transferred", "reused", "recomputed", "local")
    origin = {o: sum(r.record_sum("prompt_tokens", o) for r in replayed) for o in origins}
    return [
        ("requests", f"{len(replayed)}"),
        ("lost", f"{len(replayed) - len(served)}"),
        ("duration", f"{duration_s:.1f} s"),
        ("TTFT p50 / p90 / p99", _percentiles([r.ttft_s for r in served])),
        ("inter-token p50 / p90 / p99", _percentiles([gap for r in served for gap in r.gaps_s])),
        ("output tokens", f"{output_tokens} ({output_tokens / duration_s:.0f} tokens/s)"),
        ("prompt tokens", f"{prompt_tokens} ({prompt_tokens / duration_s:.0f} tokens/s)"),
        ("KV bytes handed over", f"{received:,} received, {produced:,} sent"),
        *((f"prompt tokens {name}", f"{origin[name]}") for name in origins[:2]),
        ("prompt tokens recomputed on decode", f"{origin['recomputed']}"),
        ("prompt tokens prefilled on decode", f"{origin['local']} (short prompts)"),
    ]


def _percentiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{percentile(values, p) * 1e3:.1f}" for p in (50, 90, 99)) + " ms"
