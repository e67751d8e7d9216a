"""What a run document's requests say, against time and as distributions. Pure."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from deploy.loadtest.figures import time_step

Request = Mapping[str, Any]
Points = list[tuple[float, float | None]]

_NUM_BINS = 60
_NUM_LATENCY_BINS = 30
_CDF_POINTS = 240
_MOST_DOTS = 1500


@dataclass(frozen=True, slots=True)
class Grid:
    """Bins of `width_s` seconds from 0 to the run's end."""

    width_s: float
    count: int

    @classmethod
    def over(cls, duration_s: float, num_bins: int = _NUM_BINS) -> "Grid":
        width_s = time_step(max(duration_s, 1e-3), num_bins)
        return cls(width_s, max(1, math.ceil(duration_s / width_s - 1e-9)))

    def bin_of(self, at_s: float) -> int:
        return min(self.count - 1, max(0, int(at_s / self.width_s)))

    def rates(self, events: Iterable[tuple[float, float]]) -> Points:
        """Return what `events`, amounts at times, come to per second in each bin."""
        sums = [0.0] * self.count
        for at_s, amount in events:
            sums[self.bin_of(at_s)] += amount
        return self.points([amount / self.width_s for amount in sums])

    def points(self, values: Sequence[float | None]) -> Points:
        """Return the values at the begins of their bins, and the last one again at the end."""
        points: Points = [(index * self.width_s, value) for index, value in enumerate(values)]
        return [*points, (self.count * self.width_s, values[-1])]


def duration_s(run: Mapping[str, Any]) -> float:
    """Return when the last thing of the run happened."""
    ends: list[float] = [request["end_s"] or request["scheduled_s"] for request in run["requests"]]
    whole_s: float = run["summary"]["duration_s"]
    return max([whole_s, *ends, 1e-3])


def is_completed(request: Request) -> bool:
    return bool(request["outcome"] == "completed")


def offered(run: Mapping[str, Any], grid: Grid) -> Points:
    return grid.rates((request["scheduled_s"], 1) for request in run["requests"])


def served(run: Mapping[str, Any], grid: Grid) -> Points:
    return grid.rates((r["end_s"], 1) for r in run["requests"] if is_completed(r))


def good(run: Mapping[str, Any], grid: Grid) -> Points:
    """Return requests per second that met the objectives, by when they were due."""
    return grid.rates((r["scheduled_s"], 1) for r in run["requests"] if r["met"])


def output_tokens(run: Mapping[str, Any], grid: Grid) -> Points:
    def events() -> Iterable[tuple[float, float]]:
        for request in run["requests"]:
            counts = [0, *request["token_counts"]]
            arrived = (later - earlier for earlier, later in pairwise(counts))
            yield from zip(request["token_s"], arrived, strict=True)

    return grid.rates(events())


def in_flight(run: Mapping[str, Any], grid: Grid) -> Points:
    """Return the most requests that were open at one time in each bin."""
    events = []
    end_of_run_s = grid.width_s * grid.count
    for request in run["requests"]:
        if request["sent_s"] is not None:
            end_s = end_of_run_s if request["end_s"] is None else request["end_s"]
            events += [(request["sent_s"], 1), (end_s, -1)]
    events.sort()
    levels = list(accumulate(change for _, change in events))
    times = [at_s for at_s, _ in events]
    most: list[float | None] = []
    for index in range(grid.count):
        first = bisect_right(times, index * grid.width_s)
        last = bisect_right(times, (index + 1) * grid.width_s)
        most.append(max([levels[first - 1] if first else 0, *levels[first:last]]))
    return grid.points(most)


def pool_sizes(run: Mapping[str, Any], column: int) -> Points:
    """Return a pool's workers against time: column 1 prefill, 2 decode."""
    return [(sample[0], sample[column]) for sample in run["pools"]]


def percentiles(
    run: Mapping[str, Any], name: str, percents: Sequence[int], length_s: float
) -> list[Points]:
    """Return for each percentile of `name` its course, by when the requests were due."""
    grid = Grid.over(length_s, _NUM_LATENCY_BINS)
    bins: list[list[float]] = [[] for _ in range(grid.count)]
    for request in run["requests"]:
        if is_completed(request) and request[name] is not None:
            bins[grid.bin_of(request["scheduled_s"])].append(request[name])
    for values in bins:
        values.sort()
    middles = [(index + 0.5) * grid.width_s for index in range(grid.count)]
    return [
        [(at_s, ranked(v, percent) if v else None) for at_s, v in zip(middles, bins, strict=True)]
        for percent in percents
    ]


def ranked(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of sorted values, at least one."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def dots(run: Mapping[str, Any], name: str) -> tuple[Points, int]:
    """Return single requests, every n-th where there are many, and n."""
    found: Points = [
        (request["scheduled_s"], request[name])
        for request in run["requests"]
        if is_completed(request) and request[name] is not None
    ]
    stride = math.ceil(len(found) / _MOST_DOTS) or 1
    return found[::stride], stride


def latencies(run: Mapping[str, Any], name: str) -> list[float]:
    """Return all values of a latency of completed requests, sorted."""
    completed = [request for request in run["requests"] if is_completed(request)]
    if name == "itl_s":
        gaps = (b - a for request in completed for a, b in pairwise(request["token_s"]))
        return sorted(gaps)
    if name == "late_s":
        return sorted(
            r["sent_s"] - r["scheduled_s"] for r in run["requests"] if r["sent_s"] is not None
        )
    return sorted(request[name] for request in completed if request[name] is not None)


def lengths(run: Mapping[str, Any], name: str) -> list[float]:
    return sorted(request[name] for request in run["requests"])


def cdf(ordered: Sequence[float]) -> Points:
    """Return (value, share of values up to it), at most a few hundred points."""
    count = len(ordered)
    if not count:
        return []
    indices = {round(i * (count - 1) / (_CDF_POINTS - 1)) for i in range(_CDF_POINTS)}
    # The tail is where it is decided.
    indices |= {min(count - 1, max(0, math.ceil(count * p) - 1)) for p in (0.99, 0.995, 0.999)}
    return [(ordered[index], (index + 1) / count) for index in sorted(indices)]


def each_run(
    runs: Sequence[Mapping[str, Any]], take: Callable[[Mapping[str, Any], Grid], Points]
) -> list[Points]:
    """Return the same course for every run, in bins of the longest one's width."""
    longest = Grid.over(max(map(duration_s, runs)))
    grids = [Grid(longest.width_s, math.ceil(duration_s(r) / longest.width_s)) for r in runs]
    return [take(run, grid) for run, grid in zip(runs, grids, strict=True)]
