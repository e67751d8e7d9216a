"""The `autoscaler:` section: control laws' parameters with their defaults, and calendar windows."""

import datetime
import itertools
import typing
from collections.abc import Iterator
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from cluster.section import Count, Positive, Seconds, Section, Share

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = typing.get_args(Day)
_DAY_MIN = 24 * 60
_WEEK_MIN = len(DAYS) * _DAY_MIN

Signal = Literal["decode_tps", "prefill_tps", "prefill_util", "decode_util", "ttft", "tbt"]

# Workers report about once a second; a shorter window would count reports, not what they say.
SHORTEST_WINDOW_S = 3.0


class CalendarWindow(Section):
    """A weekly window with pool sizes of its own: the target itself, or a floor under it."""

    days: tuple[Day, ...] = Field(DAYS, min_length=1, description="days on which it starts")
    start: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$", description='"HH:MM", quoted')
    end: str = Field(
        pattern=r"^([01]\d|2[0-3]):[0-5]\d$",
        description='"HH:MM", quoted; at or before `start` means on the next day',
    )
    prefill: Count = Field(description="prefill workers")
    decode: Count = Field(description="decode workers")
    kind: Literal["fixed", "floor"] = Field("floor", description="the target, or a floor under it")

    @field_validator("start", "end", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        if isinstance(value, int | float):
            raise ValueError('YAML read a number: put the time in quotes, as "10:00"')
        return value

    def spans(self) -> list[tuple[int, int]]:
        """Return every [start, end) in minutes since Monday 00:00; an end may pass the week's."""
        start, end = (int(time[:2]) * 60 + int(time[3:]) for time in (self.start, self.end))
        length = (end - start - 1) % _DAY_MIN + 1
        starts = [DAYS.index(day) * _DAY_MIN + start for day in sorted(set(self.days))]
        return [(each, each + length) for each in starts]

    def covers(self, minute: int) -> bool:
        """Return whether this minute since Monday 00:00 lies in the window."""
        return any(s <= minute < e or s <= minute + _WEEK_MIN < e for s, e in self.spans())

    def overlaps(self, other: Self) -> bool:
        """Return whether some minute lies in both: then one window starts in the other."""
        return any(
            outer.covers(start % _WEEK_MIN)
            for outer, inner in ((self, other), (other, self))
            for start, _ in inner.spans()
        )

    def __str__(self) -> str:
        return f"{','.join(self.days)} {self.start}-{self.end}"


class AutoscalerSection(Section):
    """How both pools are sized from one signal.

    Times are at `speedup` 1: read them through `scaled` and `window`.
    """

    mode: Literal["off", "advise", "act"] = Field(
        "off", description="off; advise: decide and log only, as if obeyed; act"
    )
    signal: Signal = Field("decode_tps", description="what sizes both pools")
    target_per_worker: Positive | None = Field(
        None, description="signal one worker should carry: tokens/s, or a share of 1 for *_util"
    )
    ratio: str = Field("1:1", pattern=r"^\d{1,4}:\d{1,4}$", description="prefill:decode workers")
    min_prefill: Count = Field(1, description="fewest prefill workers")
    max_prefill: Count = Field(8, description="most prefill workers")
    min_decode: Count = Field(1, description="fewest decode workers")
    max_decode: Count = Field(8, description="most decode workers")
    gpu_budget: Positive | None = Field(
        None, description="GPUs both pools may hold together; default: no limit"
    )
    decision_period_s: Seconds = Field(30.0, description="time between decisions")
    metric_window_s: Seconds = Field(60.0, description="signals are averaged over this")
    stale_s: Seconds = Field(120.0, description="older reports count as missing")
    speedup: float = Field(
        1.0, ge=1, description="metric windows, periods and cooldowns are divided by it (tests)"
    )

    scale_out_threshold: Annotated[float, Field(ge=0)] = Field(
        0.10, description="need over workers must exceed 1 by this to scale out"
    )
    scale_in_threshold: Share = Field(
        0.15, description="need over workers must fall below 1 by this to scale in"
    )
    scale_in_step: Share = Field(0.05, description="share of a pool one scale-in gives back")
    cooldown_out_s: Seconds = Field(180.0, description="time between scale-outs")
    cooldown_in_s: Seconds = Field(600.0, description="time from any action to a scale-in")
    soft_in_s: Seconds = Field(300.0, description="a worker scaled in may be restored for this")
    restore_latency: Positive = Field(
        1.0, description="latency / SLO above which a scale-in is taken back"
    )
    backoff_s: Seconds = Field(1200.0, description="no scale-in after one was taken back")

    slo_ttft_s: Seconds | None = Field(None, description="TTFT objective; default: not watched")
    slo_tbt_s: Seconds | None = Field(
        None, description="time between tokens objective; default: not watched"
    )
    latency_quantile: Share = Field(0.95, description="quantile held against the objectives")
    moderate_latency: Positive = Field(
        1.0, description="latency / SLO from which both pools grow by `moderate_step`"
    )
    moderate_step: Share = Field(0.10, description="share by which both pools grow")
    severe_latency: Positive = Field(
        1.2, description="latency / SLO from which both pools grow by `severe_step`"
    )
    severe_step: Share = Field(0.20, description="share by which both pools grow")
    severe_bypass_s: Seconds = Field(
        600.0, description="severe latency may skip the scale-out cooldown once in this time"
    )
    in_latency_guard: Positive = Field(
        0.9, description="no scale-in at this latency / SLO or above"
    )
    in_guard_s: Seconds = Field(600.0, description="no scale-in this long after a latency tier")
    in_latency: Positive = Field(
        0.5, description="signals ttft and tbt: latency / SLO up to which pools shrink"
    )

    arrival_term: bool = Field(
        True, description="let arriving tokens/s raise the need: bursts no worker can serve yet"
    )
    arrival_window_s: Seconds = Field(10.0, description="arrivals are averaged over this")
    length_window_s: Seconds = Field(1800.0, description="token counts are averaged over this")
    ratio_tolerance: Share = Field(0.10, description="deviation from `ratio` that is repaired")
    ratio_step: Count = Field(1, description="workers per repair of the ratio")
    gate_tolerance: Share = Field(
        0.20, description="ready workers beyond the ratio by more than this are held back"
    )
    ratio_estimation: bool = Field(
        False, description="let the ratio follow observed prompt:output lengths"
    )
    ratio_lengths: Positive | None = Field(
        None, description="prompt tokens per output token for which `ratio` holds"
    )
    ratio_drift: Positive = Field(
        0.5, description="estimates stay within a factor of 1 + this of `ratio`"
    )
    ratio_change_per_h: Positive = Field(
        0.25, description="an estimate moves at most by this share in an hour"
    )

    calendar: tuple[CalendarWindow, ...] = Field(
        (), description="weekly windows with sizes of their own; in the YAML file only"
    )
    calendar_timezone: str = Field("UTC", description="IANA zone of `calendar`")
    decision_records: Count = Field(2000, description="decisions kept in memory")
    decision_file: str | None = Field(None, description="append every decision here as JSON lines")

    @property
    def ratio_pair(self) -> tuple[int, int]:
        prefill, decode = self.ratio.split(":")
        return int(prefill), int(decode)

    @property
    def zone(self) -> datetime.tzinfo:
        # UTC without the zone database, which slim images lack.
        return datetime.UTC if self.calendar_timezone == "UTC" else ZoneInfo(self.calendar_timezone)

    def scaled(self, seconds: float) -> float:
        """Return a period or cooldown at this section's speed."""
        return seconds / self.speedup

    def window(self, seconds: float) -> float:
        """Return a metric window at this section's speed, long enough to hold reports."""
        return max(self.scaled(seconds), min(seconds, SHORTEST_WINDOW_S))

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, mode: object) -> object:
        # YAML 1.1 reads a bare off as false.
        return "off" if mode is False else mode

    @field_validator("ratio")
    @classmethod
    def _has_both_sides(cls, ratio: str) -> str:
        if "0" in {side.lstrip("0") or "0" for side in ratio.split(":")}:
            raise ValueError("neither side of a ratio may be 0: requests need both pools")
        return ratio

    @field_validator("calendar_timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            return name if name == "UTC" else ZoneInfo(name).key
        except (KeyError, OSError, ValueError):
            raise ValueError("unknown time zone: give an IANA name, as Europe/Berlin") from None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        faults = [*_bound_faults(self), *_law_faults(self), *_calendar_faults(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _bound_faults(section: AutoscalerSection) -> Iterator[str]:
    bounds = {
        "prefill": (section.min_prefill, section.max_prefill),
        "decode": (section.min_decode, section.max_decode),
    }
    crossed = [pool for pool, (fewest, most) in bounds.items() if fewest > most]
    for pool in crossed:
        fewest, most = bounds[pool]
        yield f"min_{pool} ({fewest}) is above max_{pool} ({most}): lower one or raise the other"
    prefill, decode = section.ratio_pair
    fitting = any(
        section.min_prefill <= -(-prefill * count // decode) <= section.max_prefill
        for count in range(section.min_decode, section.max_decode + 1)
    )
    if not crossed and not fitting:
        yield (
            f"no sizes within the bounds have ratio {section.ratio}:"
            " widen min_*/max_* or change the ratio"
        )


def _law_faults(section: AutoscalerSection) -> Iterator[str]:
    target, signal = section.target_per_worker, section.signal
    if signal in ("ttft", "tbt"):
        if getattr(section, f"slo_{signal}_s") is None:
            yield f"signal {signal} needs slo_{signal}_s"
    elif target is None and section.mode != "off":
        yield f"signal {signal} needs target_per_worker: set it, or run `tandem calibrate`"
    elif target is not None and target > 1 and signal.endswith("_util"):
        yield f"target_per_worker ({target}) is no utilisation: give a share of 1"
    if section.severe_latency <= section.moderate_latency:
        yield "severe_latency must be above moderate_latency"
    if section.in_latency_guard > section.moderate_latency:
        yield "in_latency_guard must not be above moderate_latency"
    if section.ratio_estimation and section.ratio_lengths is None:
        yield "ratio_estimation needs ratio_lengths: prompt tokens per output token for `ratio`"


def _calendar_faults(section: AutoscalerSection) -> Iterator[str]:
    for index, window in enumerate(section.calendar):
        if not (
            section.min_prefill <= window.prefill <= section.max_prefill
            and section.min_decode <= window.decode <= section.max_decode
        ):
            yield (
                f"calendar.{index} ({window}): {window.prefill} prefill and {window.decode} decode"
                " workers are outside min_*/max_*: widen the bounds or change the window"
            )
    for (i, one), (j, other) in itertools.combinations(enumerate(section.calendar), 2):
        if one.overlaps(other):
            yield f"calendar.{i} ({one}) and calendar.{j} ({other}) overlap: move or merge one"
