"""What `make bench-peer` reads out of vLLM's histograms."""

import pytest

from tests.benchmarks.vllm_times import TRANSFER, added, mean_s, quantile_s, since

BEFORE = {TRANSFER: {"0.005": 3.0, "0.01": 4.0, "+Inf": 4.0, "_count": 4.0, "_sum": 0.02}}
AFTER = {TRANSFER: {"0.005": 9.0, "0.01": 14.0, "+Inf": 14.0, "_count": 14.0, "_sum": 0.07}}


def test_only_what_was_counted_between_two_looks_is_counted() -> None:
    histogram = added([since(BEFORE, AFTER), since({}, BEFORE), {}], TRANSFER)
    assert histogram == AFTER[TRANSFER]
    assert mean_s(since(BEFORE, AFTER)[TRANSFER]) == pytest.approx(0.005)


def test_a_quantile_lies_within_its_bucket() -> None:
    histogram = since(BEFORE, AFTER)[TRANSFER]
    assert quantile_s(histogram, 0.3) == pytest.approx(0.0025)
    assert quantile_s(histogram, 0.8) == pytest.approx(0.0075)


def test_what_is_beyond_the_last_bound_is_at_least_that() -> None:
    assert quantile_s({"0.01": 0.0, "+Inf": 2.0, "_count": 2.0, "_sum": 9.0}, 0.5) == 0.01
    with pytest.raises(ValueError, match="no transfers"):
        quantile_s({"0.01": 0.0, "+Inf": 0.0, "_count": 0.0, "_sum": 0.0}, 0.5)
