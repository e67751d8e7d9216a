"""Bounds and budget: what comes out is allowed, and lies on the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.limits import Limits
from autoscaler.ratio import Ratio, Sizes

WIDE = Limits(Sizes(1, 1), Sizes(8, 8))
counts = st.integers(1, 12)
sizes = st.builds(Sizes, counts, counts)
ratios = st.builds(lambda p, d: Ratio(p / d), st.integers(1, 4), st.integers(1, 4))


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    fewest = draw(st.builds(Sizes, st.integers(1, 3), st.integers(1, 3)))
    most = Sizes(fewest.prefill + draw(counts), fewest.decode + draw(counts))
    gpus = draw(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.0])))
    least = fewest.prefill * gpus[0] + fewest.decode * gpus[1]
    budget = draw(st.none() | st.floats(0, 20).map(lambda more: max(0.1, least + more)))
    return Limits(fewest, most, gpus, budget)


def test_every_broken_limit_is_named() -> None:
    tight = Limits(Sizes(2, 1), Sizes(8, 3), (1.0, 1.0), 4.0)
    assert tight.faults(Sizes(1, 4)) == [
        "1 prefill workers are below min_prefill 2",
        "4 decode workers are above max_decode 3",
        "5 GPUs exceed gpu_budget 4",
    ]


@pytest.mark.parametrize(
    ("most", "budget", "wanted", "allowed"),
    [
        (Sizes(2, 8), None, Sizes(6, 6), Sizes(2, 2)),
        (Sizes(8, 8), 7.0, Sizes(6, 6), Sizes(3, 3)),
        (Sizes(8, 8), 100.0, Sizes(6, 6), Sizes(6, 6)),
    ],
)
def test_a_pool_that_may_not_grow_holds_the_other(
    most: Sizes, budget: float | None, wanted: Sizes, allowed: Sizes
) -> None:
    limits = Limits(Sizes(1, 1), most, (1.0, 1.0), budget)
    assert limits.between(Sizes(1, 1), wanted, Ratio(1.0)) == allowed


def test_a_pool_that_may_not_shrink_holds_the_other() -> None:
    limits = Limits(Sizes(4, 1), Sizes(8, 8))
    assert limits.between(Sizes(6, 6), Sizes(1, 1), Ratio(1.0)) == Sizes(4, 4)


@given(limits(), sizes, sizes, st.booleans(), ratios)
def test_on_the_way_neither_pool_turns_back(
    limits: Limits, one: Sizes, step: Sizes, is_growing: bool, ratio: Ratio
) -> None:
    current = limits.nearest(one, ratio)
    sign = 1 if is_growing else -1
    wanted = Sizes(current.prefill + sign * step.prefill, current.decode + sign * step.decode)
    found = limits.between(current, wanted, ratio)
    assert limits.allow(found)
    low, high = (current, wanted) if is_growing else (wanted, current)
    assert high.covers(found) and found.covers(low)


@given(limits(), sizes, ratios)
def test_the_nearest_sizes_are_allowed(limits: Limits, wanted: Sizes, ratio: Ratio) -> None:
    found = limits.nearest(wanted, ratio)
    assert limits.allow(found)
    assert found == wanted or not limits.allow(wanted)


def test_within_wide_limits_everything_stays() -> None:
    assert WIDE.allow(Sizes(8, 8)) and not WIDE.allow(Sizes(9, 8))
