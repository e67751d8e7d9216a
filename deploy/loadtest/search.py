"""Which rate to try next, and what its requests prove: bisection with confidence. Pure.

A rate is met if at least `share` of its requests meet their objectives. Its requests are a sample:
a rate counts as met or missed once the whole confidence interval of that share lies on one side of
`share`, and is measured longer until then.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# Two-sided 95 %.
_Z = 1.959963984540054


class Verdict(StrEnum):
    MET = "met"
    MISSED = "missed"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Probe:
    """`num_met` of `num_requests` at `rate` requests per second met their objectives.

    `is_cut` if it was ended early because it could not be met any more; then the requests that
    were still to come do not count.
    """

    rate: float
    num_met: int
    num_requests: int
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """Where to look and how closely.

    Rates are requests per second; the result is within `precision` of the highest rate that is
    met, as a share of it. A probe has as many requests as come in `probe_s`, at least
    `min_requests`; after `max_requests` at one rate the share itself decides.
    """

    start_rate: float
    share: float = 0.9
    precision: float = 0.05
    min_requests: int = 50
    max_requests: int = 2000
    probe_s: float = 20.0
    max_rate: float = 1000.0

    @property
    def min_rate(self) -> float:
        """Below a hundredth of where the search starts it would go on for hours."""
        return self.start_rate / 100


@dataclass(frozen=True, slots=True)
class Measure:
    """Send `num_requests` at `rate`."""

    rate: float
    num_requests: int


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate that was met, 0 if none was, the lowest that was missed, and why it ends."""

    rate: float
    bound: float | None
    why: str


def interval(num_met: int, num_requests: int) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of the share."""
    if num_requests == 0:
        return 0.0, 1.0
    share, z2 = num_met / num_requests, _Z * _Z
    centre = (share + z2 / (2 * num_requests)) / (1 + z2 / num_requests)
    spread = math.sqrt(share * (1 - share) / num_requests + z2 / (4 * num_requests * num_requests))
    half = _Z * spread / (1 + z2 / num_requests)
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(probes: Sequence[Probe], plan: SearchPlan) -> Verdict:
    """Return what the probes at one rate say of it, taken together."""
    met = sum(probe.num_met for probe in probes)
    count = sum(probe.num_requests for probe in probes)
    low, high = interval(met, count)
    if any(probe.is_cut for probe in probes) or high < plan.share:
        return Verdict.MISSED
    if low >= plan.share:
        return Verdict.MET
    if count < plan.max_requests:
        return Verdict.OPEN
    return Verdict.MET if met >= plan.share * count else Verdict.MISSED


def is_hopeless(num_missed: int, num_requests: int, plan: SearchPlan) -> bool:
    """Return whether a probe is missed however the rest of its requests end."""
    return interval(num_requests - num_missed, num_requests)[1] < plan.share


def next_step(probes: Sequence[Probe], plan: SearchPlan) -> Measure | Found:
    """Return what to measure next, or the result."""
    met, missed = 0.0, math.inf
    for rate, measured in _by_rate(probes).items():
        match verdict(measured, plan):
            case Verdict.OPEN:
                return _longer(rate, measured, plan)
            case Verdict.MET:
                met = max(met, rate)
            case Verdict.MISSED:
                missed = min(missed, rate)
    return _between(met, missed, plan)


def so_far(probes: Sequence[Probe], plan: SearchPlan, why: str) -> Found | None:
    """Return what is known if the search ends here; None if no rate was met below the missed."""
    said = {rate: verdict(measured, plan) for rate, measured in _by_rate(probes).items()}
    bound = min((rate for rate in said if said[rate] is Verdict.MISSED), default=None)
    met = [rate for rate in said if said[rate] is Verdict.MET and (bound is None or rate < bound)]
    return Found(max(met), bound, why) if met else None


def _by_rate(probes: Sequence[Probe]) -> dict[float, list[Probe]]:
    by_rate: dict[float, list[Probe]] = {}
    for probe in probes:
        by_rate.setdefault(probe.rate, []).append(probe)
    return by_rate


def _between(met: float, missed: float, plan: SearchPlan) -> Measure | Found:
    if met >= missed:
        # Chance, or an endpoint that warmed up meanwhile: the lower figure is the safe one.
        return Found(missed / (1 + plan.precision), missed, "a lower rate was missed than was met")
    if met == 0.0 and missed == math.inf:
        return _first(plan.start_rate, plan)
    if missed == math.inf:
        if met >= plan.max_rate:
            return Found(met, None, f"met at {plan.max_rate:g}/s, the highest rate that is tried")
        return _first(min(plan.max_rate, met * 2), plan)
    if met == 0.0:
        if missed <= plan.min_rate:
            return Found(0.0, missed, f"missed at {missed:g}/s, the lowest rate that is tried")
        return _first(max(plan.min_rate, missed / 2), plan)
    if missed <= met * (1 + plan.precision):
        return Found(met, missed, f"met at {met:.4g}/s, missed at {missed:.4g}/s")
    return _first(math.sqrt(met * missed), plan)


def _first(rate: float, plan: SearchPlan) -> Measure:
    count = max(plan.min_requests, math.ceil(rate * plan.probe_s))
    return Measure(rate, min(count, plan.max_requests))


def _longer(rate: float, probes: Sequence[Probe], plan: SearchPlan) -> Measure:
    """As many again as there were: an interval half as wide takes four times as many."""
    count = sum(probe.num_requests for probe in probes)
    return Measure(rate, max(1, min(count, plan.max_requests - count)))
