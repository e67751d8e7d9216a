"""Latency histograms: what is observed comes back within the promised error, however merged."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.latency import FIRST_S, LAST_S, RELATIVE_ERROR, LatencyCounts, LatencyObserver

seconds = st.floats(min_value=FIRST_S, max_value=LAST_S)
many = st.lists(seconds, max_size=20)


def counts_of(*latencies: float) -> LatencyCounts:
    observer = LatencyObserver()
    for latency in latencies:
        observer.observe(latency)
    return observer.counts()


@given(seconds)
def test_a_latency_comes_back_within_the_error(latency: float) -> None:
    found = counts_of(latency).quantile(0.5)
    assert found == pytest.approx(latency, rel=RELATIVE_ERROR * 1.001)


@given(st.lists(seconds, min_size=1, max_size=20), st.floats(0, 1))
def test_a_quantile_is_near_the_latency_of_that_rank(latencies: list[float], q: float) -> None:
    found = counts_of(*latencies).quantile(q)
    rank = max(1, -int(-q * len(latencies) // 1))
    assert found == pytest.approx(sorted(latencies)[rank - 1], rel=RELATIVE_ERROR * 1.001)


@given(many, many)
def test_merging_is_observing_both(one: list[float], other: list[float]) -> None:
    both = counts_of(*one).plus(counts_of(*other))
    assert both == counts_of(*one, *other) and both.count == len(one) + len(other)


@given(many, many)
def test_what_came_since_is_what_was_observed_since(one: list[float], since: list[float]) -> None:
    assert counts_of(*one, *since).minus(counts_of(*one)) == counts_of(*since)


def test_a_histogram_that_started_over_is_no_successor() -> None:
    with pytest.raises(ValueError, match="lacks"):
        counts_of(0.1).minus(counts_of(0.1, 0.1))


def test_latencies_outside_the_range_count_at_its_ends() -> None:
    assert counts_of(0.0, 1e-9).quantile(0.5) == counts_of(FIRST_S).quantile(0.5)
    assert counts_of(1e9).quantile(0.5) == counts_of(LAST_S).quantile(0.5)


def test_nothing_observed_has_no_quantile() -> None:
    assert LatencyCounts().quantile(0.99) is None and LatencyCounts().count == 0


@given(many)
def test_documents_round_trip_and_are_sparse(latencies: list[float]) -> None:
    counts = counts_of(*latencies)
    document = counts.as_document()
    assert LatencyCounts.from_document(document) == counts
    assert len(document) <= len(latencies)


@pytest.mark.parametrize(
    "document",
    [
        [[1, 0]],
        [[2, 1], [1, 1]],
        [[1, 1], [1, 1]],
        [[-1, 1]],
        [[10_000, 1]],
        [[1, -1]],
        [[1, 1.5]],
        [[1, True]],
        [[1]],
        [1],
        None,
    ],
)
def test_a_document_that_is_no_histogram_is_refused(document: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        LatencyCounts.from_document(document)


def test_counts_are_taken_at_one_moment() -> None:
    observer = LatencyObserver()
    taken = []
    for latency in (0.1, 0.2, 0.3):
        observer.observe(latency)
        taken.append(observer.counts())
    assert [each.count for each in taken] == [1, 2, 3]
    assert all(later.minus(earlier).count == 1 for earlier, later in itertools.pairwise(taken))
