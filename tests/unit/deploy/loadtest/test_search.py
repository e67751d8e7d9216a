"""A rate is met, missed or measured longer; bisection ends within its precision."""

from random import Random

import pytest

from deploy.loadtest.search import (
    Found,
    Measure,
    Probe,
    SearchPlan,
    Verdict,
    interval,
    is_hopeless,
    next_step,
    so_far,
    verdict,
)

PLAN = SearchPlan(start_rate=4.0, max_requests=400, probe_s=10.0)


def test_wilsons_interval() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    assert list(interval(90, 100)) == pytest.approx([0.8256, 0.9448], abs=1e-4)
    assert interval(50, 50)[1] == 1.0 and interval(0, 50)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("met", "count", "expected"),
    [(50, 50, Verdict.MET), (30, 50, Verdict.MISSED), (46, 50, Verdict.OPEN)],
)
def test_the_interval_decides(met: int, count: int, expected: Verdict) -> None:
    assert verdict([Probe(1.0, met, count)], PLAN) is expected


def test_what_stays_open_is_measured_longer_and_then_decided_by_its_share() -> None:
    probes = [Probe(4.0, 46, 50)]
    assert next_step(probes, PLAN) == Measure(4.0, 50)
    probes += [Probe(4.0, 45, 50), Probe(4.0, 91, 100)]
    assert next_step(probes, PLAN) == Measure(4.0, 200)
    assert verdict([*probes, Probe(4.0, 178, 200)], PLAN) is Verdict.MET, "360 of 400"
    assert verdict([*probes, Probe(4.0, 177, 200)], PLAN) is Verdict.MISSED


def test_a_probe_is_cut_only_when_nothing_can_save_it() -> None:
    assert not is_hopeless(9, 50, PLAN) and is_hopeless(10, 50, PLAN)
    assert verdict([Probe(4.0, 0, 12, is_cut=True)], PLAN) is Verdict.MISSED


def test_rates_double_until_one_is_missed_and_halve_until_one_is_met() -> None:
    assert next_step([], PLAN) == Measure(4.0, 50)
    assert next_step([Probe(4.0, 50, 50)], PLAN) == Measure(8.0, 80)
    assert next_step([Probe(4.0, 0, 50)], PLAN) == Measure(2.0, 50)
    assert next_step([Probe(0.04, 0, 50)], PLAN) == Found(
        0.0, 0.04, "missed at 0.04/s, the lowest rate that is tried"
    )
    highest = next_step([Probe(1000.0, 400, 400)], PLAN)
    assert isinstance(highest, Found) and highest.rate == 1000.0 and highest.bound is None


@pytest.mark.parametrize(
    ("edge", "start"), [(1.5, 100.0), (500.0, 0.1), (7.0, 7.0), (7.0, 6.9), (31.6, 1.0)]
)
def test_it_finds_a_sharp_edge(edge: float, start: float) -> None:
    plan = SearchPlan(start_rate=start)
    probes: list[Probe] = []
    while isinstance(step := next_step(probes, plan), Measure):
        met = step.num_requests if step.rate <= edge else 0
        probes.append(Probe(step.rate, met, step.num_requests))
        assert len(probes) < 40
    assert step.rate <= edge <= step.rate * (1 + plan.precision) * (1 + 1e-9)


def test_what_ends_early_knows_the_highest_rate_below_all_that_were_missed() -> None:
    assert so_far([Probe(4.0, 46, 50)], PLAN, "so") is None
    probes = [Probe(rate, met, 50) for rate, met in ((1.0, 50), (2.0, 50), (4.0, 0), (8.0, 50))]
    assert so_far(probes, PLAN, "so") == Found(2.0, 4.0, "so")
    assert so_far(probes[2:], PLAN, "so") is None


def test_chance_does_not_keep_it_from_an_end() -> None:
    rng = Random(1)
    probes: list[Probe] = []
    while isinstance(step := next_step(probes, PLAN), Measure):
        share = max(0.0, min(1.0, 1.0 - step.rate / 100))
        met = sum(rng.random() < share for _ in range(step.num_requests))
        probes.append(Probe(step.rate, met, step.num_requests))
        assert len(probes) < 60
    assert 6.0 < step.rate < 14.0
