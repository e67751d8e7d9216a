"""Arrival processes: their rates and the variation of their gaps, with fixed seeds."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from cluster.errors import ConfigError
from deploy.loadtest.arrivals import Curve, following, gamma, poisson, read_curve, weibull
from deploy.loadtest.servegen import generate, mean_rate, read_clients

COUNT = 4000


def until(arrivals: Iterator[float], end_s: float) -> list[float]:
    return list(itertools.takewhile(lambda at_s: at_s < end_s, arrivals))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gamma_gaps_have_the_rate_and_cv_asked_for(cv: float) -> None:
    times = list(itertools.islice(gamma(5.0, cv, Random(1)), COUNT))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.08, abs=1e-6)


@pytest.mark.parametrize("cv", [0.4, 3.0])
def test_the_rate_holds_from_the_first_second_on(cv: float) -> None:
    """A process that begins with a whole gap would have (CV^2 - 1)/2 arrivals too many."""
    counts = [len(until(gamma(5.0, cv, Random(seed)), 2.0)) for seed in range(400)]
    assert statistics.fmean(counts) == pytest.approx(10.0, rel=0.06)


def test_weibull_and_poisson_have_their_rates() -> None:
    for process in (weibull(5.0, 0.7, Random(2)), poisson(5.0, Random(2))):
        assert len(until(process, 800.0)) == pytest.approx(4000, rel=0.06)


def test_arrivals_follow_a_curve() -> None:
    curve = Curve((0.0, 1.0, 2.0), (0.0, 1.0, 0.0))
    times = until(following(lambda s: 10 * curve.at(s / 100), 10.0, Random(3)), 200.0)
    assert len(times) == pytest.approx(1000, rel=0.08)
    middle = sum(50 <= at_s < 150 for at_s in times)
    assert middle / len(times) == pytest.approx(0.75, abs=0.04)


def test_the_measured_curve_is_read_and_others_are_refused() -> None:
    curve = read_curve("dialogue_decode")
    assert curve.length == 24.0
    assert curve.at(0.125) == pytest.approx((0.3054 + 0.3525) / 2)
    assert curve.at(24.25) == pytest.approx(curve.at(0.25))
    with pytest.raises(ConfigError, match="no column 'night'"):
        read_curve("night")


def test_servegen_clients_send_what_their_windows_say(tmp_path: Path) -> None:
    (tmp_path / "chunk-7-trace.csv").write_text(
        "0,0.2,1,Gamma,1,5\n600,1,2,Gamma,0.25,4\n1200,0.5,1.4,Weibull,0.8,1.8\n1800,0,0,,0,0\n"
    )
    lengths = '{"input_tokens": "{5: 0.5, 90: 0.5}", "output_tokens": "{1: 0.9, 400: 0.1}"}'
    (tmp_path / "chunk-7-dataset.json").write_text(f'{{"0": {lengths}}}')
    clients = read_clients(tmp_path)
    sent = list(generate(clients, 300, 2.0, Random(4)))
    assert mean_rate(clients, 300, 1500) == pytest.approx((300 * 0.2 + 600 + 300) / 1500)
    assert len(sent) == pytest.approx(2 * 960, rel=0.1)
    assert all(earlier.at_s <= later.at_s for earlier, later in itertools.pairwise(sent))
    assert {request.prompt_tokens for request in sent} == {5, 90}
    assert sum(request.output_tokens == 400 for request in sent) / len(sent) == pytest.approx(
        0.1, abs=0.03
    )
