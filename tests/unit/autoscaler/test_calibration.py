"""The search for the best P:D split, on a model of pools whose best split is known."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.calibration import (
    EDGE,
    Measurement,
    Objectives,
    SplitResult,
    choose,
    next_clients,
    splits,
    summarise,
)
from autoscaler.limits import Limits
from autoscaler.ratio import Sizes

OBJECTIVES = Objectives(ttft_s=1.0, tbt_s=0.05)
MOST = 512


@dataclass(frozen=True)
class Pools:
    """Closed-loop pools: prefill limits requests/s, decode slows down with its batch."""

    prompt_s: float = 0.05
    step_s: float = 0.02
    step_per_client_s: float = 0.001
    output_tokens: int = 20

    def measure(self, sizes: Sizes, clients: int) -> Measurement:
        most_prefilled = sizes.prefill / self.prompt_s
        tbt_s = self.step_s + self.step_per_client_s * clients / sizes.decode
        request_s = self.prompt_s + self.output_tokens * tbt_s
        finished = min(clients / request_s, most_prefilled)
        ttft_s = clients / finished - self.output_tokens * tbt_s
        return Measurement(sizes, clients, finished * self.output_tokens, ttft_s, tbt_s)

    def edge(self, sizes: Sizes) -> int:
        """Return the most clients that hold the objectives, by trying all."""
        held = (n for n in range(1, MOST + 1) if self.measure(sizes, n).is_feasible(OBJECTIVES))
        return max(held, default=0)


def search(pools: Pools, sizes: Sizes, first: int = 4) -> list[Measurement]:
    measured: list[Measurement] = []
    while clients := next_clients(measured, OBJECTIVES, first, MOST):
        measured.append(pools.measure(sizes, clients))
        assert len(measured) < 40
    return measured


def measurement(clients: int, tps: float, *, ttft_s: float = 0.1, failed: int = 0) -> Measurement:
    return Measurement(Sizes(1, 1), clients, tps, ttft_s, 0.01, failed)


@given(
    prompt_s=st.floats(0.005, 0.5),
    per_client_s=st.floats(0.0001, 0.02),
    split=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    first=st.integers(1, 300),
)
def test_the_search_ends_near_the_edge_or_at_saturation(
    prompt_s: float, per_client_s: float, split: tuple[int, int], first: int
) -> None:
    pools, sizes = Pools(prompt_s, step_per_client_s=per_client_s), Sizes(*split)
    measured = search(pools, sizes, first)
    assert len({m.clients for m in measured}) == len(measured), "nothing is measured twice"
    edge, result = pools.edge(sizes), summarise(sizes, measured, OBJECTIVES)
    if edge == 0:
        assert result.best is None
        return
    assert result.best is not None and result.best.clients <= edge
    reached = max(m.clients for m in measured if m.is_feasible(OBJECTIVES))
    near = reached * EDGE >= edge - 1
    most = max(pools.measure(sizes, n).decode_tps for n in range(1, edge + 1))
    assert near or result.best.decode_tps > most * 0.94, "else throughput no longer grew"


def test_the_sweep_finds_the_best_split() -> None:
    pools = Pools(prompt_s=0.02, step_s=0.03)
    results = [
        summarise(sizes, search(pools, sizes), OBJECTIVES)
        for sizes in splits(6, Limits(Sizes(1, 1), Sizes(8, 8)))
    ]
    by_hand = max(
        (sizes for sizes in splits(6, Limits(Sizes(1, 1), Sizes(8, 8)))),
        key=lambda sizes: pools.measure(sizes, pools.edge(sizes)).decode_tps,
    )
    choice = choose(results)
    assert choice is not None and choice.sizes == by_hand == Sizes(2, 4)
    assert choice.ratio == "1:2"
    per_worker = choice.measurement.decode_tps / 4
    assert choice.target_per_worker == pytest.approx(0.8 * per_worker, rel=0.01)
    assert "2P4D carries" in choice.reason and "more than" in choice.reason


def test_splits_keep_to_the_limits() -> None:
    bounds = (Sizes(1, 2), Sizes(3, 8))
    assert splits(5, Limits(*bounds)) == [Sizes(1, 4), Sizes(2, 3), Sizes(3, 2)]
    assert splits(5, Limits(*bounds, (4.0, 1.0), 11.0)) == [Sizes(1, 4), Sizes(2, 3)]
    assert splits(5, Limits(Sizes(4, 4), Sizes(8, 8))) == []


def test_a_first_load_that_is_too_much_is_halved_down_to_one_client() -> None:
    tried: list[Measurement] = []
    while clients := next_clients(tried, OBJECTIVES, 8, MOST):
        tried.append(measurement(clients, 10.0, ttft_s=5.0))
    assert [m.clients for m in tried] == [8, 4, 2, 1]
    result = summarise(Sizes(1, 1), tried, OBJECTIVES)
    assert result.best is None
    assert result.reason == "1 clients: TTFT 5 s is above 1 s"


def test_growth_stops_when_throughput_does_and_at_the_most_clients() -> None:
    flat = [measurement(4, 100.0), measurement(8, 102.0)]
    assert next_clients(flat, OBJECTIVES, 4, MOST) is None
    assert summarise(Sizes(1, 1), flat, OBJECTIVES).reason == "saturated within the objectives"
    assert next_clients([measurement(4, 100.0)], OBJECTIVES, 4, 6) == 6
    assert next_clients([measurement(6, 100.0)], OBJECTIVES, 4, 6) is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (measurement(4, 1.0, failed=2), "2 requests failed"),
        (measurement(4, 1.0, ttft_s=math.inf), "TTFT inf s is above 1 s"),
        (Measurement(Sizes(1, 1), 4, 1.0, 0.1, 0.06), "TBT 0.06 s is above 0.05 s"),
    ],
)
def test_every_fault_is_named(fault: Measurement, words: str) -> None:
    assert fault.faults(OBJECTIVES) == [words]


def test_no_split_within_the_objectives_is_no_choice() -> None:
    assert choose([SplitResult(Sizes(1, 1), None, "too slow")]) is None
    assert choose([]) is None


def test_the_ratio_is_in_lowest_terms_and_the_splits_that_fail_are_counted() -> None:
    best = Measurement(Sizes(4, 2), 16, 1000.0, 0.1, 0.01)
    failing = SplitResult(Sizes(1, 5), None, "too slow")
    choice = choose([failing, SplitResult(Sizes(4, 2), best, "saturated")])
    assert choice is not None
    assert (choice.ratio, choice.target_per_worker) == ("2:1", 400.0)
    assert "1 of 2 splits never hold them" in choice.reason
