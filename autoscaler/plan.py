"""A decision in the making: what it rests on, and the sizes as the laws change them one by one."""

import datetime
from dataclasses import dataclass, replace
from typing import Self

from autoscaler.decision import Clamp, Driver, PolicyState
from autoscaler.limits import Limits
from autoscaler.ratio import Ratio, Sizes
from autoscaler.signals import Snapshot
from autoscaler.windows import Missing, Reading
from cluster.autoscaler_config import AutoscalerSection, CalendarWindow

_DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class Facts:
    """What every law may look at; `latency` is the worst latency over its objective.

    `set_back_s` is by how much the clock is behind the last decision; no stamp of `state` is in
    the future.
    """

    config: AutoscalerSection
    state: PolicyState
    snapshot: Snapshot
    now: float
    signal: Reading
    latency: Reading
    ratio: Ratio
    limits: Limits
    window: CalendarWindow | None
    set_back_s: float = 0.0

    @property
    def current(self) -> Sizes:
        return self.state.target

    def latency_reaches(self, level: float) -> bool:
        return not isinstance(self.latency, Missing) and self.latency >= level

    def since(self, *times: float | None) -> float | None:
        """Return the seconds since the latest of the times, None if there was none."""
        known = [time for time in times if time is not None]
        return self.now - max(known) if known else None


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes on their way from the raw target to the final one."""

    driver: Driver
    raw: Sizes | None
    sizes: Sizes
    reason: str
    clamps: tuple[Clamp, ...] = ()
    is_bypassing: bool = False

    def clamp(self, name: str, sizes: Sizes, reason: str) -> Self:
        """Return the plan with other sizes and why; the same sizes leave no trace."""
        if sizes == self.sizes:
            return self
        clamp = Clamp(name, self.sizes, sizes, reason)
        return replace(self, sizes=sizes, clamps=(*self.clamps, clamp))

    def driven_by(self, driver: Driver) -> Self:
        return replace(self, driver=driver)


def calendar_window(config: AutoscalerSection, now: float) -> CalendarWindow | None:
    """Return the calendar window that `now` lies in; windows do not overlap."""
    local = datetime.datetime.fromtimestamp(now, config.zone)
    minute = local.weekday() * _DAY_MIN + local.hour * 60 + local.minute
    return next((window for window in config.calendar if window.covers(minute)), None)
