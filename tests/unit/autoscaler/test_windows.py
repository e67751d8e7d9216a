"""Windows over counters that start over and vanish: rates never fall below nought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.windows import (
    Missing,
    Window,
    latency_total,
    number_total,
    quantile,
    rate,
    reading_as_document,
    reading_from_document,
    share,
)
from cluster.latency import LatencyCounts, LatencyObserver


def filled(*samples: tuple[float, float], length_s: float = 60.0) -> Window[float]:
    window: Window[float] = Window(length_s)
    for now, value in samples:
        window.record(now, value)
    return window


def test_a_rate_is_growth_over_time() -> None:
    assert rate(filled((0, 0.0), (30, 300.0), (60, 900.0))) == pytest.approx(15)


def test_old_samples_leave_but_one_as_the_base() -> None:
    window = filled(*((float(t), 10.0 * t) for t in range(0, 200, 10)))
    window.record(200, 1990.0)
    assert rate(window) == pytest.approx((1990 - 1400) / 60)


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([], "no sample yet"),
        ([(0.0, 1.0)], "0 s of a window of 60 s"),
        ([(0.0, 1.0), (29.0, 2.0)], "29 s of a window of 60 s"),
    ],
)
def test_a_window_that_is_not_filled_says_so(samples: list[tuple[float, float]], says: str) -> None:
    assert rate(filled(*samples)) == Missing(says)


def test_a_window_may_be_read_before_it_is_full_if_it_is_meant_to() -> None:
    window: Window[float] = Window(1800, least_fill=0.0)
    window.record(0, 0.0)
    assert isinstance(rate(window), Missing)
    window.record(1, 5.0)
    assert rate(window) == 5.0


def test_a_sample_of_the_same_moment_replaces_the_last() -> None:
    assert rate(filled((0, 0.0), (60, 1.0), (60, 60.0))) == 1.0


def test_a_clock_that_is_set_back_starts_the_window_over() -> None:
    assert isinstance(rate(filled((0, 0.0), (60, 60.0), (30, 70.0))), Missing)


def test_a_share_of_nothing_is_idle() -> None:
    still = filled((0, 5.0), (60, 5.0))
    assert share(still, still, "nobody") == Missing("nobody", is_idle=True)
    assert share(filled((0, 0.0), (60, 3.0)), filled((0, 0.0), (60, 4.0)), "") == 0.75


def test_a_counter_first_seen_counts_from_there() -> None:
    total = number_total()
    total.update({"a": 1000.0})
    assert total.value == 0
    total.update({"a": 1010.0, "b": 500.0})
    total.update({"a": 1010.0, "b": 505.0})
    assert total.value == 15


def test_a_counter_that_starts_over_counts_from_its_new_start() -> None:
    total = number_total()
    for value in (100.0, 150.0, 7.0, 9.0):
        total.update({"a": value})
    assert total.value == 52


Events = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e6), max_size=3))


@given(Events)
def test_a_total_never_falls_whatever_counters_do(events: list[dict[str, float]]) -> None:
    total, before = number_total(), 0.0
    for counters in events:
        total.update(counters)
        assert total.value >= before
        before = total.value


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30))
def test_a_rate_lies_between_the_slowest_and_the_fastest_second(growth: list[float]) -> None:
    window: Window[float] = Window(float(len(growth)))
    value = 0.0
    window.record(0, value)
    for second, grown in enumerate(growth, start=1):
        value += grown
        window.record(float(second), value)
    found = rate(window)
    assert not isinstance(found, Missing)
    assert min(growth) - 1e-9 <= found <= max(growth) + 1e-9


def latencies(*seconds: float) -> LatencyCounts:
    observer = LatencyObserver()
    for each in seconds:
        observer.observe(each)
    return observer.counts()


def test_a_quantile_is_of_this_window_only() -> None:
    window: Window[LatencyCounts] = Window(60)
    window.record(0, latencies(10.0))
    window.record(60, latencies(10.0, 0.1))
    assert quantile(window, 0.99) == pytest.approx(0.1, rel=0.06)
    window.record(120, latencies(10.0, 0.1))
    assert quantile(window, 0.99) == Missing("no request in the window", is_idle=True)


def test_latencies_of_a_router_that_starts_over_are_not_subtracted() -> None:
    total = latency_total()
    for counts in (latencies(1.0), latencies(1.0, 1.0), latencies(0.1), latencies(0.1, 0.2)):
        total.update({"r": counts})
    assert total.value == latencies(1.0, 0.2)


@given(st.one_of(st.floats(allow_nan=False), st.builds(Missing, st.text(), st.booleans())))
def test_readings_survive_their_documents(reading: float | Missing) -> None:
    assert reading_from_document(reading_as_document(reading)) == reading
