"""The last hour, one sample a second: sizes, signal, what clients saw, hand-offs. Pure.

Routers report counters that only grow, so what came in a window is the difference of two sums.
Times are whole Unix seconds.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from cluster.latency import LatencyCounts
from cluster.load import RouterLoad
from cluster.names import Role, RouterId

LENGTH_S = 3600
# Rates and percentiles are over this much: short enough to follow, long enough to hold requests.
WINDOW_S = 10
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

_COUNTERS = (
    "arrived",
    "finished",
    "failed",
    "output_tokens",
    "handoffs",
    "handoff_bytes",
    "handoff_failures",
)
_HISTOGRAMS = ("ttft", "tbt")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests, hand-offs and latencies of all routers together."""

    arrived: int = 0
    finished: int = 0
    failed: int = 0
    output_tokens: int = 0
    handoffs: int = 0
    handoff_bytes: int = 0
    handoff_failures: int = 0
    ttft: LatencyCounts = field(default_factory=LatencyCounts)
    tbt: LatencyCounts = field(default_factory=LatencyCounts)

    @classmethod
    def of(cls, load: RouterLoad) -> Self:
        return cls(**{name: getattr(load, name) for name in (*_COUNTERS, *_HISTOGRAMS)})

    def plus(self, other: Self) -> Self:
        counters = {name: getattr(self, name) + getattr(other, name) for name in _COUNTERS}
        return type(self)(**counters, ttft=self.ttft.plus(other.ttft), tbt=self.tbt.plus(other.tbt))

    def minus(self, earlier: Self) -> Self:
        """Return what came after `earlier`; raise `ValueError` if that is no older state."""
        counters = {name: getattr(self, name) - getattr(earlier, name) for name in _COUNTERS}
        if any(count < 0 for count in counters.values()):
            raise ValueError("a count cannot fall")
        return type(self)(
            **counters, ttft=self.ttft.minus(earlier.ttft), tbt=self.tbt.minus(earlier.tbt)
        )


@dataclass(frozen=True, slots=True)
class Recent:
    """`traffic` of the last `seconds`, 0 before there are two samples."""

    seconds: int
    traffic: Traffic

    def per_s(self, counter: str) -> float | None:
        count: int = getattr(self.traffic, counter)
        return count / self.seconds if self.seconds else None

    def percentiles(self, histogram: str) -> dict[str, float | None]:
        """Return seconds by name of the quantile, None where nothing was seen."""
        counts: LatencyCounts = getattr(self.traffic, histogram)
        return {name: counts.quantile(q) for name, q in QUANTILES.items()}

    def rates(self) -> dict[str, float | None]:
        return {f"{name}_per_s": self.per_s(name) for name in _COUNTERS}


@dataclass(frozen=True, slots=True)
class Scales:
    """The pools and the signal at one moment; `wanted` and `ready` count workers.

    `signal`, its `capacity` and `target` are in the signal's unit, None for what is not known.
    """

    wanted: Mapping[Role, int]
    ready: Mapping[Role, int]
    signal: float | None = None
    capacity: float | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One second; the names are the columns of `History.document`."""

    at: int
    prefill_wanted: int
    decode_wanted: int
    prefill_ready: int
    decode_ready: int
    signal: float | None
    capacity: float | None
    target: float | None
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    tbt_p50: float | None
    tbt_p95: float | None
    tbt_p99: float | None
    arrived_per_s: float | None
    finished_per_s: float | None
    failed_per_s: float | None
    output_tokens_per_s: float | None
    handoffs_per_s: float | None
    handoff_bytes_per_s: float | None
    handoff_failures_per_s: float | None


COLUMNS = tuple(each.name for each in dataclasses.fields(Sample))


class History:
    """The samples of the last `length_s` seconds; it never holds more than that many."""

    def __init__(self, length_s: int = LENGTH_S) -> None:
        self._samples: deque[Sample] = deque(maxlen=length_s)
        self._last: Mapping[RouterId, RouterLoad] = {}
        self._total = Traffic()
        self._totals: deque[tuple[int, Traffic]] = deque()

    def __repr__(self) -> str:
        return f"<History of {len(self._samples)} s>"

    def is_due(self, now: float) -> bool:
        """Return whether the second of `now` has no sample yet."""
        return not self._samples or int(now) != self._samples[-1].at

    def add(self, now: float, routers: Iterable[RouterLoad], scales: Scales) -> None:
        """Take the sample of this second."""
        at = int(now)
        if self._samples and at < self._samples[-1].at:
            # The clock was set back: what came before cannot be told from what comes now.
            self._samples.clear()
            self._totals.clear()
        self._count(at, routers)
        recent = self.recent()
        latencies = {
            f"{histogram}_{quantile}": seconds
            for histogram in _HISTOGRAMS
            for quantile, seconds in recent.percentiles(histogram).items()
        }
        self._samples.append(
            Sample(
                at=at,
                prefill_wanted=scales.wanted[Role.PREFILL],
                decode_wanted=scales.wanted[Role.DECODE],
                prefill_ready=scales.ready[Role.PREFILL],
                decode_ready=scales.ready[Role.DECODE],
                signal=scales.signal,
                capacity=scales.capacity,
                target=scales.target,
                **latencies,
                **recent.rates(),
            )
        )

    def recent(self) -> Recent:
        """Return what came in the last window."""
        if not self._totals:
            return Recent(0, Traffic())
        (since, first), (until, last) = self._totals[0], self._totals[-1]
        return Recent(until - since, last.minus(first))

    def document(self, after: int) -> dict[str, Any]:
        """Return the samples later than `after`, oldest first, as rows under `columns`."""
        newer = [sample for sample in self._samples if sample.at > after]
        return {
            "columns": list(COLUMNS),
            "rows": [[getattr(sample, name) for name in COLUMNS] for sample in newer],
            "next": newer[-1].at if newer else after,
            "window_s": WINDOW_S,
        }

    def _count(self, at: int, routers: Iterable[RouterLoad]) -> None:
        known = {load.router_id: load for load in routers}
        for router_id, load in known.items():
            # What it counted before it was first heard says nothing about this hour.
            earlier = self._last.get(router_id, load)
            try:
                grown = Traffic.of(load).minus(Traffic.of(earlier))
            except ValueError:
                continue
            self._total = self._total.plus(grown)
        self._last = known
        self._totals.append((at, self._total))
        while len(self._totals) > 2 and self._totals[1][0] <= at - WINDOW_S:
            self._totals.popleft()
