"""How long the steps of hand-offs took, as counts that travel with an engine's other totals. Pure.

They are measured in an engine's processes and exported by its worker's, so they cross as plain
numbers that add up over ranks: `time_STAGE_us` is a stage's sum in microseconds, `time_STAGE_le_I`
how many durations fell into bucket I.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Upper bounds in seconds; one more bucket holds what is above the last one.
BUCKETS_S = tuple(x * 10**e for e in (-4, -3, -2, -1, 0) for x in (1, 2.5, 5))
_KEY = re.compile(r"time_(?P<stage>[a-z]+)_(?:us|le_(?P<bucket>\d+))")


@dataclass(frozen=True, slots=True)
class TimeCounts:
    """One stage's durations: how many fell into each bucket, and their sum."""

    buckets: Sequence[int]
    sum_s: float


class StageClock:
    """Counts the durations of one stage in `counts`; they only grow."""

    def __init__(self, counts: Counter[str], stage: str) -> None:
        self._counts = counts
        self._sum = f"time_{stage}_us"
        self._buckets = tuple(f"time_{stage}_le_{i}" for i in range(len(BUCKETS_S) + 1))

    def add(self, seconds: float) -> None:
        self._counts[self._sum] += round(seconds * 1e6)
        self._counts[self._buckets[bisect_left(BUCKETS_S, seconds)]] += 1


def without_times(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the totals that are no durations."""
    return {key: count for key, count in counts.items() if _KEY.fullmatch(key) is None}


def times_in(counts: Mapping[str, int]) -> dict[str, TimeCounts]:
    """Return the durations among an engine's totals, by stage."""
    buckets: dict[str, list[int]] = {}
    sums_us: dict[str, int] = {}
    for key, count in counts.items():
        if (match := _KEY.fullmatch(key)) is None:
            continue
        stage = match["stage"]
        counted = buckets.setdefault(stage, [0] * (len(BUCKETS_S) + 1))
        if match["bucket"] is None:
            sums_us[stage] = count
        else:
            counted[int(match["bucket"])] += count
    return {
        stage: TimeCounts(tuple(counted), sums_us.get(stage, 0) / 1e6)
        for stage, counted in buckets.items()
    }
