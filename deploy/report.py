"""What a replay on our own pools came to: where prompts' KV came from, and what is wrong. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.loadtest.measures import gaps_s, percentile
from deploy.loadtest.words import RequestRecord

# Where decode samples the first token, it recomputes the last one of the prompt; more means that
# the KV cache did not arrive.
_MAX_RECOMPUTED = 1
_ORIGINS = ("transferred", "reused", "recomputed", "local")

Routed = Mapping[int, Mapping[str, Any]]


def routed_sum(record: Mapping[str, Any], *path: str) -> int:
    """Add up one figure over a router record's sequences; absent ones count as nothing."""
    total = 0
    for sequence in record.get("sequences", []):
        value: Any = sequence
        for key in path:
            value = (value or {}).get(key)
        total += value or 0
    return total


def faults(records: Sequence[RequestRecord], routed: Routed) -> list[str]:
    """Return everything that makes the run a failure, one line each.

    `routed` are the router's own records of the requests, by index.
    """
    lines = [f"request {r.index}: {r.error}" for r in records if not r.is_completed]
    for record in records:
        recomputed = routed_sum(routed.get(record.index, {}), "prompt_tokens", "recomputed")
        if recomputed > _MAX_RECOMPUTED:
            lines.append(f"request {record.index}: decode recomputed {recomputed} prompt tokens")
        if record.is_completed and record.index not in routed:
            lines.append(f"request {record.index}: the router has no record of it")
    return lines


def rows(
    records: Sequence[RequestRecord], routed: Routed, duration_s: float
) -> list[tuple[str, str]]:
    """Return the report as (what, figure)."""
    served = [record for record in records if record.is_completed]
    output_tokens = sum(record.received_tokens for record in records)
    prompt_tokens = sum(record.send.prompt_tokens for record in served)
    ttfts = [record.ttft_s for record in served if record.ttft_s is not None]
    received, produced = (
        sum(routed_sum(each, name) for each in routed.values())
        for name in ("received_bytes", "produced_bytes")
    )
    origin = {
        name: sum(routed_sum(each, "prompt_tokens", name) for each in routed.values())
        for name in _ORIGINS
    }
    return [
        ("requests", f"{len(records)}"),
        ("lost", f"{len(records) - len(served)}"),
        ("duration", f"{duration_s:.1f} s"),
        ("TTFT p50 / p90 / p99", _percentiles(ttfts)),
        ("inter-token p50 / p90 / p99", _percentiles([g for r in served for g in gaps_s(r)])),
        ("output tokens", f"{output_tokens} ({output_tokens / duration_s:.0f} tokens/s)"),
        ("prompt tokens", f"{prompt_tokens} ({prompt_tokens / duration_s:.0f} tokens/s)"),
        ("KV bytes handed over", f"{received:,} received, {produced:,} sent"),
        *((f"prompt tokens {name}", f"{origin[name]}") for name in _ORIGINS[:2]),
        ("prompt tokens recomputed on decode", f"{origin['recomputed']}"),
        ("prompt tokens prefilled on decode", f"{origin['local']} (short prompts)"),
    ]


def _percentiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{percentile(values, p) * 1e3:.1f}" for p in (50, 90, 99)) + " ms"
