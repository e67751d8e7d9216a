"""Cores are shared by nobody until there are not enough of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cores import choose_cores


@pytest.mark.parametrize(
    ("cores", "taken", "wanted", "chosen"),
    [
        ([0, 1], [], 1, (0,)),
        ([0, 1], [(0,)], 1, (1,)),
        ([0, 1], [(0,), (1,)], 1, (0,)),
        ([0, 1, 2, 3], [(0, 1)], 2, (2, 3)),
        ([2, 5, 7], [(5,)], 2, (2, 7)),
        ([0, 1], [], 8, (0, 1)),
    ],
)
def test_the_least_used_cores_come_first(
    cores: list[int], taken: list[tuple[int, ...]], wanted: int, chosen: tuple[int, ...]
) -> None:
    assert choose_cores(cores, taken, wanted) == chosen


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 20))
def test_workers_share_cores_evenly(num_cores: int, wanted: int, num_workers: int) -> None:
    taken: list[tuple[int, ...]] = []
    for _ in range(num_workers):
        taken.append(choose_cores(range(num_cores), taken, wanted))
    uses = [sum(core in cpus for cpus in taken) for core in range(num_cores)]
    assert max(uses) - min(uses) <= 1
