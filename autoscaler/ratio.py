"""P:D arithmetic: pool sizes that keep the ratio, how far sizes are off it, and its re-estimation.

A fixed ratio is wrong once prompt and output lengths drift, so it may follow them: slowly, and
within a bound around what calibration found.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from cluster.autoscaler_config import AutoscalerSection

# Keeps 1.1 * 10 workers at 11 and not at 12: floats are a hair off.
_ROUNDING = 1e-9
_HOUR_S = 3600.0


def round_up(workers: float) -> int:
    return math.ceil(workers - _ROUNDING)


def round_down(workers: float) -> int:
    return math.floor(workers + _ROUNDING)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many workers each pool has or should have: (P, D)."""

    prefill: int
    decode: int

    def covers(self, other: Self) -> bool:
        """Return whether neither pool is smaller than the other sizes'."""
        return self.prefill >= other.prefill and self.decode >= other.decode

    def as_document(self) -> list[int]:
        return [self.prefill, self.decode]

    @classmethod
    def from_document(cls, document: Any) -> Self:
        prefill, decode = document
        return cls(int(prefill), int(decode))

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Prefill workers per decode worker."""

    value: float

    @classmethod
    def configured(cls, config: AutoscalerSection) -> Self:
        prefill, decode = config.ratio_pair
        return cls(prefill / decode)

    def prefill_for(self, decode: int) -> int:
        """Return the fewest prefill workers that keep up with this many decode workers."""
        return round_up(self.value * decode)

    def decode_for(self, prefill: int) -> int:
        """Return the fewest decode workers that keep up with this many prefill workers."""
        return round_up(prefill / self.value)

    def sizes(self, decode: int) -> Sizes:
        return Sizes(self.prefill_for(decode), decode)

    def deviation(self, sizes: Sizes) -> float:
        """Return how far the sizes are off: 0.1 is 10 % too much prefill, -0.1 too little."""
        return sizes.prefill / sizes.decode / self.value - 1

    def __str__(self) -> str:
        return f"{self.value:.3g}:1"


def reestimate(
    config: AutoscalerSection, previous: Ratio, tokens: tuple[float, float], elapsed_s: float
) -> Ratio:
    """Return the ratio that fits the observed mean (prompt, output) tokens, a step from `previous`.

    Prefill work grows with prompt tokens and decode work with output tokens, so the ratio that
    balances them is proportional to prompt tokens per output token.
    """
    assert config.ratio_lengths is not None
    configured = Ratio.configured(config).value
    lengths = tokens[0] / tokens[1]
    fitting = configured * lengths / config.ratio_lengths
    drift = 1 + config.ratio_drift
    bounded = min(max(fitting, configured / drift), configured * drift)
    step = 1 + config.ratio_change_per_h * elapsed_s * config.speedup / _HOUR_S
    return Ratio(min(max(bounded, previous.value / step), previous.value * step))
