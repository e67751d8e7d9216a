"""A failure counts unless the machine was taken away meanwhile."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.stolen_time import (
    LIMIT,
    CpuTimes,
    StolenTime,
    is_let_down,
    parse_cpu_times,
    share_stolen,
)


def test_idle_time_is_not_wanted() -> None:
    stat = "cpu  10 1 5 9000 70 1 3 20 0 0\ncpu0 10 1 5 9000 70 1 3 20 0 0\n"
    assert parse_cpu_times(stat) == CpuTimes(used=20, stolen=20)
    assert share_stolen(CpuTimes(0, 0), parse_cpu_times(stat)) == 0.5
    assert share_stolen(CpuTimes(7, 7), CpuTimes(7, 7)) == 0.0


def test_the_worst_slice_of_a_test_or_of_the_last_minute() -> None:
    stolen = StolenTime(CpuTimes(0, 0), 0.0)
    for now, times in ((5, (1, 9)), (10, (10, 10)), (100, (30, 30)), (105, (40, 30))):
        stolen.add(CpuTimes(*times), now)
    assert stolen.newest == 0.0
    assert stolen.worst(since=104.0, now=106.0) == 0.5, "what broke it was a little earlier"
    assert stolen.worst(since=5.0, now=106.0) == 0.9
    assert stolen.worst(since=200.0, now=200.0) == 0.0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([], False), ([0.9], True), ([0.9, LIMIT], False), ([0.9, None], False), ([0.9, 0.3], True)],
)
def test_one_failure_of_its_own_is_enough(shares: list[float | None], expected: bool) -> None:
    reports: list[Any] = [
        SimpleNamespace(user_properties=[] if share is None else [("stolen_time", share)])
        for share in shares
    ]
    assert is_let_down(reports) is expected
