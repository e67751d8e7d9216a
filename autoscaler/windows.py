"""Sliding windows over cumulative counters: rates, shares and latency quantiles.

Pure: time comes with the samples, in Unix seconds. What is not known is `Missing` with a reason,
never a number.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.latency import LatencyCounts

# A window that has filled by less says too little of the load.
LEAST_FILL = 0.5


@dataclass(frozen=True, slots=True)
class Missing:
    """No value, and why; `is_idle`: the source was heard, and there was nothing to measure."""

    reason: str
    is_idle: bool = False


Reading = float | Missing


def reading_as_document(reading: Reading) -> float | dict[str, object]:
    if isinstance(reading, Missing):
        return {"missing": reading.reason, "is_idle": reading.is_idle}
    return reading


def reading_from_document(document: Any) -> Reading:
    if isinstance(document, Mapping):
        return Missing(document["missing"], document["is_idle"])
    return float(document)


Amount = TypeVar("Amount")


class Total(Generic[Amount]):
    """Many cumulative counters, which start over or vanish, as one that only grows.

    A key names one life of a counter. What it counted before it was first seen is left out: it
    says nothing about this window.
    """

    def __init__(
        self,
        zero: Amount,
        plus: Callable[[Amount, Amount], Amount],
        since: Callable[[Amount, Amount], Amount | None],
    ) -> None:
        self.value = zero
        self._plus = plus
        self._since = since
        self._last: Mapping[Any, Amount] = {}

    def update(self, counters: Mapping[Any, Amount]) -> None:
        """Add what the counters grew by; one that fell has started over and counts from here."""
        for key, counter in counters.items():
            earlier = self._last.get(key)
            grown = None if earlier is None else self._since(counter, earlier)
            if grown is not None:
                self.value = self._plus(self.value, grown)
        self._last = counters


def number_total() -> Total[float]:
    """Return a total over counters that are numbers."""
    return Total(
        0.0,
        lambda total, grown: total + grown,
        lambda counter, earlier: counter - earlier if counter >= earlier else None,
    )


def latency_total() -> Total[LatencyCounts]:
    """Return a total over latency histograms."""
    return Total(LatencyCounts(), LatencyCounts.plus, _latencies_since)


def _latencies_since(counts: LatencyCounts, earlier: LatencyCounts) -> LatencyCounts | None:
    try:
        return counts.minus(earlier)
    except ValueError:
        return None


class Window(Generic[Amount]):
    """Samples (time, value) of the last `length_s`, and one from before as the base."""

    def __init__(self, length_s: float, least_fill: float = LEAST_FILL) -> None:
        self.length_s = length_s
        self._least_s = least_fill * length_s
        self._samples: deque[tuple[float, Amount]] = deque()

    def record(self, now: float, value: Amount) -> None:
        # Samples from before the clock was set back cannot be compared with those after.
        if self._samples and now < self._samples[-1][0]:
            self._samples.clear()
        if self._samples and now == self._samples[-1][0]:
            self._samples.pop()
        self._samples.append((now, value))
        self._forget(now)

    def span(self) -> "Span[Amount] | Missing":
        """Return the window up to its last sample, or why it says nothing."""
        if not self._samples:
            return Missing("no sample yet")
        (since, first), (until, last) = self._samples[0], self._samples[-1]
        if until == since or until - since < self._least_s:
            return Missing(f"{until - since:.3g} s of a window of {self.length_s:g} s")
        return Span(until - since, first, last)

    def _forget(self, now: float) -> None:
        begin = now - self.length_s
        while len(self._samples) > 1 and self._samples[1][0] <= begin:
            self._samples.popleft()


@dataclass(frozen=True, slots=True)
class Span(Generic[Amount]):
    """A cumulative value at both ends of `seconds`."""

    seconds: float
    first: Amount
    last: Amount


def rate(window: Window[float]) -> Reading:
    """Return how much the counter grows per second."""
    span = window.span()
    return span if isinstance(span, Missing) else (span.last - span.first) / span.seconds


def share(part: Window[float], whole: Window[float], idle: str) -> Reading:
    """Return growth of one counter over growth of the other; `Missing(idle)` if that stood."""
    parts, wholes = part.span(), whole.span()
    if isinstance(parts, Missing):
        return parts
    if isinstance(wholes, Missing):
        return wholes
    grown = wholes.last - wholes.first
    return (parts.last - parts.first) / grown if grown > 0 else Missing(idle, is_idle=True)


def quantile(window: Window[LatencyCounts], q: float) -> Reading:
    """Return the latency in seconds that a share `q` of the window's requests did not exceed."""
    span = window.span()
    if isinstance(span, Missing):
        return span
    seconds = span.last.minus(span.first).quantile(q)
    return Missing("no request in the window", is_idle=True) if seconds is None else seconds
