"""When requests come: endless processes, each a generator of seconds after its start.

Renewal processes are stationary: the first gap is what is left of one that began earlier, so the
expected number of arrivals is the rate times the time from the first second on, whatever the CV.
"""

import csv
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cluster.errors import ConfigError

DATA = Path(__file__).parent / "data"
CURVES = DATA / "heteroscale_24h.csv"


def poisson(rate: float, rng: Random) -> Iterator[float]:
    """Yield arrivals with independent exponential gaps: CV 1."""
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield at_s


def gamma(rate: float, cv: float, rng: Random) -> Iterator[float]:
    """Yield arrivals with Gamma gaps of mean 1/rate and coefficient of variation `cv`.

    `cv` 0 is a metronome, 1 Poisson, above 1 bursts.
    """
    if cv == 0.0:
        return _metronome(rate, rng)
    shape = cv**-2
    scale = 1.0 / (rate * shape)
    # What is left of a gap under way is a uniform share of one drawn by its length.
    first = rng.random() * rng.gammavariate(shape + 1.0, scale)
    return _renewals(first, lambda: rng.gammavariate(shape, scale))


def weibull(rate: float, shape: float, rng: Random) -> Iterator[float]:
    """Yield arrivals with Weibull gaps of mean 1/rate."""
    scale = 1.0 / (rate * math.gamma(1.0 + 1.0 / shape))
    by_length = scale * rng.gammavariate(1.0 + 1.0 / shape, 1.0) ** (1.0 / shape)
    return _renewals(rng.random() * by_length, lambda: rng.weibullvariate(scale, shape))


def _metronome(rate: float, rng: Random) -> Iterator[float]:
    return _renewals(rng.random() / rate, lambda: 1.0 / rate)


def _renewals(first: float, gap: Callable[[], float]) -> Iterator[float]:
    at_s = first
    while True:
        yield at_s
        at_s += gap()


def following(rate: Callable[[float], float], highest: float, rng: Random) -> Iterator[float]:
    """Yield Poisson arrivals whose rate at second t is `rate(t)`, nowhere above `highest`."""
    for at_s in poisson(highest, rng):
        if rng.random() * highest < rate(at_s):
            yield at_s


@dataclass(frozen=True, slots=True)
class Curve:
    """A measured curve, linear between its points, the same again after its end."""

    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def length(self) -> float:
        return self.times[-1]

    @property
    def peak(self) -> float:
        return max(self.values)

    def at(self, time: float) -> float:
        time %= self.length
        index = bisect_right(self.times, time)
        t0, t1 = self.times[index - 1], self.times[index]
        v0, v1 = self.values[index - 1], self.values[index]
        return v0 + (v1 - v0) * (time - t0) / (t1 - t0)


def read_curve(column: str, path: Path = CURVES) -> Curve:
    """Return one column against its hours; raise `ConfigError` naming what is wrong."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from None
    columns: Sequence[str] = [key for key in (rows[0] if rows else ()) if key != "hour"]
    if column not in columns:
        raise ConfigError(f"{path}:1: no column {column!r}; there are {', '.join(columns)}")
    points = [_point(row, column, f"{path}:{line}") for line, row in enumerate(rows, start=2)]
    times = tuple(hour for hour, _ in points)
    if len(points) < 2 or times[0] != 0.0 or list(times) != sorted(set(times)):
        raise ConfigError(f"{path}: hours must rise from 0, one row for each")
    return Curve(times, tuple(value for _, value in points))


def _point(row: dict[str, str | None], column: str, place: str) -> tuple[float, float]:
    try:
        hour, value = float(row["hour"] or ""), float(row[column] or "")
    except (KeyError, ValueError):
        raise ConfigError(f"{place}: hour and {column} must be numbers") from None
    if not (math.isfinite(hour) and value >= 0.0):
        raise ConfigError(f"{place}: {column} must not be negative, nor either of them infinite")
    return hour, value
