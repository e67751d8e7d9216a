"""P:D arithmetic: sizes keep the ratio, and an estimate moves slowly and not far."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.ratio import Ratio, Sizes, reestimate, round_down, round_up
from tests.unit.autoscaler.samples import section

HOUR = 3600.0


@pytest.mark.parametrize(
    ("ratio", "decode", "prefill"),
    [("1:1", 4, 4), ("9:7", 7, 9), ("9:7", 1, 2), ("1:5", 5, 1), ("1:5", 6, 2), ("9:1", 3, 27)],
)
def test_prefill_follows_decode(ratio: str, decode: int, prefill: int) -> None:
    found = Ratio.configured(section(ratio=ratio)).sizes(decode)
    assert found == Sizes(prefill, decode)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 500))
def test_following_there_and_back_never_comes_short(p: int, d: int, count: int) -> None:
    ratio = Ratio(p / d)
    assert ratio.prefill_for(ratio.decode_for(count)) >= count
    assert ratio.decode_for(ratio.prefill_for(count)) >= count
    assert ratio.prefill_for(count) == -(-p * count // d)


def test_floats_do_not_cost_a_worker() -> None:
    assert round_up(1.1 * 10) == 11 and round_down(0.95 * 20) == 19


def test_deviation_is_relative_to_the_ratio() -> None:
    assert Ratio(2.0).deviation(Sizes(3, 2)) == pytest.approx(-0.25)


def test_sizes_cover_only_if_neither_pool_is_smaller() -> None:
    assert Sizes(2, 2).covers(Sizes(2, 1)) and not Sizes(2, 2).covers(Sizes(1, 3))
    assert str(Sizes(2, 3)) == "2P3D" and Sizes.from_document([2, 3]) == Sizes(2, 3)


def test_the_ratio_follows_lengths_by_a_small_step() -> None:
    config = section(ratio="1:1", ratio_estimation=True, ratio_lengths=4.0)
    stepped = reestimate(config, Ratio(1.0), (600, 100), HOUR)
    assert stepped.value == pytest.approx(1.25)
    arrived = reestimate(config, Ratio(1.4), (600, 100), HOUR)
    assert arrived.value == pytest.approx(1.5)
    assert reestimate(config, Ratio(1.0), (600, 100), 0.0) == Ratio(1.0)


@given(st.floats(0.5, 2), st.floats(1, 1e5), st.floats(1, 1e5), st.floats(0, 1e7))
def test_an_estimate_stays_near_what_was_calibrated(
    previous: float, prompt: float, output: float, elapsed_s: float
) -> None:
    config = section(ratio="1:1", ratio_estimation=True, ratio_lengths=4.0, ratio_drift=1.0)
    found = reestimate(config, Ratio(previous), (prompt, output), elapsed_s).value
    assert 0.5 - 1e-9 <= found <= 2 + 1e-9
