"""Numbers as people read them, and round steps for axes. Pure."""

import math
from collections.abc import Sequence

_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 86400)
# Of each decade, as many of these as a logarithmic axis needs for a few ticks.
_DIGITS: tuple[Sequence[float], ...] = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
_FEWEST_TICKS = 4
NOTHING = "–"  # noqa: RUF001  # an en dash stands for "not known"


def seconds(value: float | None) -> str:
    """Write a latency with three digits in the unit that suits it."""
    if value is None:
        return NOTHING
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(value) * factor >= 0.9995 or unit == "µs":
            return f"{_digits(value * factor)} {unit}" if value else "0 s"
    return NOTHING


def number(value: float | None) -> str:
    """Write a count in full, another number with three digits."""
    if value is None:
        return NOTHING
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return _digits(value)


def rate(value: float | None) -> str:
    return NOTHING if value is None else f"{number(value)}/s"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{_digits(100 * value)} %"


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:,.{min(decimals, 6)}f}" if decimals else f"{value:,.0f}"


def tick(value: float) -> str:
    """Write a round number without zeros behind the point."""
    return f"{value:,.10g}"


def tick_seconds(value: float) -> str:
    """Write a round time in the unit that suits it, without zeros behind the point."""
    factor, unit = next(
        (pair for pair in ((1.0, "s"), (1e3, "ms")) if value * pair[0] >= 0.9995), (1e6, "µs")
    )
    return f"{value * factor:.6g} {unit}" if value else "0"


def tick_percent(value: float) -> str:
    return f"{100 * value:.6g} %"


def clock(value: float) -> str:
    """Write a time of the run: `45 s`, `3:20`, `1:02:00`."""
    if value < 120:
        return f"{value:g} s"
    minutes, second = divmod(round(value), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def step(span: float, count: int) -> float:
    """Return the round distance (1, 2 or 5 times a power of ten) that divides `span` into at most
    about `count`."""
    rough = max(span, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 5, 10) if rough <= power * each * (1 + 1e-9))


def time_step(span_s: float, count: int) -> float:
    """Return the same for times: round in seconds, minutes and hours."""
    rough = span_s / count
    if rough < 1:
        return step(span_s, count)
    return next((each for each in _TIME_STEPS_S if rough <= each), step(span_s, count))


def decades(low: float, high: float) -> list[float]:
    """Return round values of a logarithmic axis, the fewer the more decades it has."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values: list[float] = []
    for each in _DIGITS:
        values = [digit * 10.0**power for power in powers for digit in each]
        values = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(values) >= _FEWEST_TICKS:
            break
    return values
