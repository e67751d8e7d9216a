"""Tells tests that failed from tests that a shared machine let down.

A virtual machine on a busy host stands still while others have its cores, for seconds at a time:
the `steal` column of /proc/stat (proc(5)) counts it. As a pytest plugin (`-p tests.stolen_time`),
this ends a run with status `TEMPORARY_FAILURE` if in each test that failed there were five seconds
of whose computing time more than `LIMIT` was stolen; `make test` then has this wait for a quiet
machine (`python -m tests.stolen_time`) and runs those tests once more. On a machine that is left
alone, and where nothing counts stolen time, every failure counts at once.
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

# EX_TEMPFAIL of sysexits(3).
TEMPORARY_FAILURE = 75
LIMIT = 0.25
_SLICE_S, _LATELY_S, _MAX_SLICES = 5.0, 60.0, 1000
_QUIET_S, _PATIENCE_S = 20.0, 600.0
_PROPERTY = "stolen_time"


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Ticks of all cores since the machine started."""

    used: int
    stolen: int


def parse_cpu_times(stat: str) -> CpuTimes:
    """Return what the first line of /proc/stat says."""
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, stat.split()[1:9])
    return CpuTimes(user + nice + system + irq + softirq, stolen)


def share_stolen(before: CpuTimes, after: CpuTimes) -> float:
    """Return the share that was stolen of the time that the machine could have used."""
    stolen = after.stolen - before.stolen
    wanted = after.used - before.used + stolen
    return stolen / wanted if wanted else 0.0


class StolenTime:
    """What share was stolen in each slice of some seconds, newest last."""

    def __init__(self, times: CpuTimes, now: float) -> None:
        self._times = times
        self._slices: deque[tuple[float, float]] = deque([(now, 0.0)], maxlen=_MAX_SLICES)

    def add(self, times: CpuTimes, now: float) -> None:
        """End a slice."""
        self._slices.append((now, share_stolen(self._times, times)))
        self._times = times

    @property
    def newest(self) -> float:
        return self._slices[-1][1]

    def worst(self, since: float, now: float) -> float:
        """Return the share of the worst slice since then, and of the last minute in any case: a
        test that finds broken what was set up before it fails at once."""
        begin = min(since, now - _LATELY_S)
        return max((share for end, share in self._slices if end >= begin), default=0.0)


def read_cpu_times() -> CpuTimes:
    return parse_cpu_times(Path("/proc/stat").read_text())


def is_let_down(reports: Sequence[pytest.TestReport]) -> bool:
    """Return whether each of the failed tests' reports tells of more stolen time than `LIMIT`."""
    properties = [dict(report.user_properties) for report in reports]
    shares = [float(str(each.get(_PROPERTY, 0.0))) for each in properties]
    return bool(shares) and min(shares) > LIMIT


class _Plugin:
    """One per process: workers measure, the process that has their reports concludes."""

    def __init__(self) -> None:
        self._stolen = StolenTime(read_cpu_times(), time.monotonic())
        self._failed: list[pytest.TestReport] = []
        self._began = 0.0
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while True:
            time.sleep(_SLICE_S)
            self._stolen.add(read_cpu_times(), time.monotonic())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        self._began = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed:
            share = self._stolen.worst(self._began, time.monotonic())
            report.user_properties.append((_PROPERTY, share))
            report.sections.append(("Stolen time", f"up to {share:.0%} in {_SLICE_S:.0f} s"))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.TESTS_FAILED and is_let_down(self._failed):
            session.exitstatus = TEMPORARY_FAILURE


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Plugin())


def wait_for_quiet() -> None:
    """Return once little has been stolen for a while, or patience is at its end."""
    now = time.monotonic()
    stolen, began = StolenTime(read_cpu_times(), now), now
    quiet_since = began
    while now - quiet_since < _QUIET_S and now - began < _PATIENCE_S:
        time.sleep(_SLICE_S)
        now = time.monotonic()
        stolen.add(read_cpu_times(), now)
        if stolen.newest > LIMIT:
            quiet_since = now


if __name__ == "__main__":
    print("tests failed while the machine was taken away: once more when it is quiet", flush=True)
    wait_for_quiet()
