"""Which P:D split of a fixed total carries most within the objectives, and what that asks of one
worker. Pure: measurements in, the next load to try or the choice out.

For each split the load is a number of clients that each keep one request open. It doubles while
the objectives hold and throughput grows, then the edge is narrowed down.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoscaler.limits import Limits
from autoscaler.ratio import Sizes

# Doubling the clients without this much more throughput means that the split is saturated.
LEAST_GAIN = 0.03
# The edge between held and broken objectives is known well enough within this factor.
EDGE = 1.15
# What a worker is asked to carry, of what it carried at the edge.
HEADROOM = 0.8


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits for TTFT and for the time between tokens, in seconds, at one quantile of both."""

    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One split under one load. Latencies are at the objectives' quantile, infinite if unknown."""

    sizes: Sizes
    clients: int
    decode_tps: float
    ttft_s: float
    tbt_s: float
    num_failed: int = 0

    def faults(self, objectives: Objectives) -> list[str]:
        """Return what this load breaks, in words; nothing means that the split can carry it."""
        faults = []
        if self.num_failed:
            faults.append(f"{self.num_failed} requests failed")
        if self.ttft_s > objectives.ttft_s:
            faults.append(f"TTFT {self.ttft_s:.3g} s is above {objectives.ttft_s:g} s")
        if self.tbt_s > objectives.tbt_s:
            faults.append(f"TBT {self.tbt_s:.3g} s is above {objectives.tbt_s:g} s")
        return faults

    def is_feasible(self, objectives: Objectives) -> bool:
        return not self.faults(objectives)


@dataclass(frozen=True, slots=True)
class SplitResult:
    """The most one split carries within the objectives; None: nothing, for `reason`."""

    sizes: Sizes
    best: Measurement | None
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The split to configure: `ratio` as the configuration writes it, tokens/s per worker."""

    sizes: Sizes
    ratio: str
    target_per_worker: float
    measurement: Measurement
    reason: str


def splits(total: int, limits: Limits) -> list[Sizes]:
    """Return every split of `total` workers that the limits allow, fewest prefill first."""
    every = (Sizes(prefill, total - prefill) for prefill in range(1, total))
    return [sizes for sizes in every if limits.allow(sizes)]


def next_clients(
    measured: Sequence[Measurement], objectives: Objectives, first: int, most: int
) -> int | None:
    """Return with how many clients to measure one split next, None when it is known enough."""
    if not measured:
        return min(first, most)
    held = [m for m in measured if m.is_feasible(objectives)]
    broken = [m.clients for m in measured if not m.is_feasible(objectives)]
    if not held:
        # The first load was too much already.
        return min(broken) // 2 or None
    if broken:
        return _between(max(m.clients for m in held), min(broken))
    if _is_saturated(held):
        return None
    largest = max(m.clients for m in held)
    return min(2 * largest, most) if largest < most else None


def _between(held: int, broken: int) -> int | None:
    """Return the geometric middle of the edge, None where that is narrow enough."""
    if broken <= held * EDGE or broken - held < 2:
        return None
    return min(max(round(math.sqrt(held * broken)), held + 1), broken - 1)


def _is_saturated(held: Sequence[Measurement]) -> bool:
    ordered = sorted(held, key=lambda m: m.clients)
    if len(ordered) < 2:
        return False
    return ordered[-1].decode_tps < ordered[-2].decode_tps * (1 + LEAST_GAIN)


def summarise(sizes: Sizes, measured: Sequence[Measurement], objectives: Objectives) -> SplitResult:
    """Return the most that one split carried, and what ended the search."""
    held = [m for m in measured if m.is_feasible(objectives)]
    broken = sorted((m.clients, m) for m in measured if not m.is_feasible(objectives))
    if not held:
        least = min(measured, key=lambda m: m.clients)
        faults = " and ".join(least.faults(objectives))
        return SplitResult(sizes, None, f"{least.clients} clients: {faults}")
    best = max(held, key=lambda m: m.decode_tps)
    if broken:
        clients, edge = broken[0]
        return SplitResult(
            sizes, best, f"{clients} clients: {' and '.join(edge.faults(objectives))}"
        )
    if not _is_saturated(held):
        most = max(m.clients for m in held)
        return SplitResult(sizes, best, f"still growing at {most} clients, the most tried")
    return SplitResult(sizes, best, "saturated within the objectives")


def choose(results: Sequence[SplitResult], headroom: float = HEADROOM) -> Choice | None:
    """Return the split with the most decode tokens/s, None if no split holds the objectives.

    The target is what one decode worker did there, less the headroom: by it the autoscaler
    sizes the decode pool, and by the ratio the other one.
    """
    ranked = sorted(_feasible(results), key=lambda m: m.decode_tps, reverse=True)
    if not ranked:
        return None
    best = ranked[0]
    sizes = best.sizes
    divisor = math.gcd(sizes.prefill, sizes.decode)
    return Choice(
        sizes=sizes,
        ratio=f"{sizes.prefill // divisor}:{sizes.decode // divisor}",
        target_per_worker=_rounded(headroom * best.decode_tps / sizes.decode),
        measurement=best,
        reason=_reason(ranked, len(results) - len(ranked), headroom),
    )


def _feasible(results: Sequence[SplitResult]) -> Iterator[Measurement]:
    return (result.best for result in results if result.best is not None)


def _reason(ranked: Sequence[Measurement], num_out: int, headroom: float) -> str:
    best = ranked[0]
    parts = [f"{best.sizes} carries {best.decode_tps:.4g} decode tokens/s within the objectives"]
    if len(ranked) > 1:
        lead = best.decode_tps / ranked[1].decode_tps - 1
        parts.append(f"{lead:.0%} more than {ranked[1].sizes}")
    if num_out:
        parts.append(f"{num_out} of {num_out + len(ranked)} splits never hold them")
    per_worker = best.decode_tps / best.sizes.decode
    parts.append(f"target: {headroom:g} of {per_worker:.4g} tokens/s per decode worker")
    return "; ".join(parts)


def _rounded(value: float) -> float:
    """Return three significant digits: a measurement knows no more."""
    return float(f"{value:.3g}")
