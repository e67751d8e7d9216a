"""Latency histograms that can be added, subtracted and sent: counts over fixed log buckets.

A quantile is within 5 % of the observed value between 0.1 ms and 1000 s; what lies outside is
counted at the nearer end.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

RELATIVE_ERROR = 0.05
FIRST_S, LAST_S = 1e-4, 1e3

# A bucket is reported by its geometric middle, which is one error away from either edge.
_LOG_GROWTH = 2 * math.log1p(RELATIVE_ERROR)
_NUM_BUCKETS = math.ceil(math.log(LAST_S / FIRST_S) / _LOG_GROWTH)


def _bucket(seconds: float) -> int:
    bounded = min(max(seconds, FIRST_S), LAST_S)
    return min(int(math.log(bounded / FIRST_S) / _LOG_GROWTH), _NUM_BUCKETS - 1)


def _middle_s(bucket: int) -> float:
    return FIRST_S * math.exp((bucket + 0.5) * _LOG_GROWTH)


@dataclass(frozen=True, slots=True)
class LatencyCounts:
    """How many latencies fell into each bucket: (bucket, count) ascending, no zero counts."""

    buckets: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        return sum(count for _, count in self.buckets)

    def plus(self, other: Self) -> Self:
        total = Counter(dict(self.buckets))
        total.update(dict(other.buckets))
        return type(self)(tuple(sorted(total.items())))

    def minus(self, earlier: Self) -> Self:
        """Return what came after `earlier`, an older state of the same histogram.

        Raises `ValueError` where `earlier` is not one: a count cannot fall.
        """
        since = Counter(dict(self.buckets))
        since.subtract(dict(earlier.buckets))
        if any(count < 0 for count in since.values()):
            raise ValueError("the other histogram holds latencies that this one lacks")
        return type(self)(tuple(sorted((b, count) for b, count in since.items() if count)))

    def quantile(self, q: float) -> float | None:
        """Return the latency in seconds that a share `q` of 0..1 does not exceed; None if empty."""
        rank = max(1, math.ceil(q * self.count))
        for bucket, count in self.buckets:
            rank -= count
            if rank <= 0:
                return _middle_s(bucket)
        return None

    def as_document(self) -> list[list[int]]:
        return [[bucket, count] for bucket, count in self.buckets]

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Return the histogram; raise `TypeError` or `ValueError` for anything that is not one."""
        buckets = tuple((_whole(bucket), _whole(count)) for bucket, count in document)
        names = [bucket for bucket, _ in buckets]
        if names != sorted(set(names)) or any(bucket >= _NUM_BUCKETS for bucket in names):
            raise ValueError("buckets must be known and ascending")
        if any(count == 0 for _, count in buckets):
            raise ValueError("empty buckets are left out")
        return cls(buckets)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


class LatencyObserver:
    """Where latencies are counted as they are seen; its counts only grow."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def observe(self, seconds: float) -> None:
        self._counts[_bucket(seconds)] += 1

    def counts(self) -> LatencyCounts:
        """Return everything observed so far."""
        return LatencyCounts(tuple(sorted(self._counts.items())))
