"""Latencies from the scheduled time, service levels, the fluidity index, and what was used."""

import pytest

from deploy.loadtest.measures import (
    Span,
    Terms,
    attainment,
    deadlines,
    fluidity,
    percentile,
    scheduling,
    spread,
    summarise,
    worker_seconds,
)
from deploy.loadtest.words import Outcome, Slo
from tests.unit.deploy.loadtest.records import record

SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0
    assert spread([]) is None
    assert spread([1.0, 3.0]) == {
        "mean": 2.0,
        "p50": 1.0,
        "p90": 3.0,
        "p95": 3.0,
        "p99": 3.0,
        "max": 3.0,
    }


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = record(1.0, [1.5, 1.6, 1.8])
    late.sent_s = 1.3
    assert late.ttft_s == pytest.approx(0.5)
    assert late.e2e_s == pytest.approx(0.8)
    assert late.tpot_s == pytest.approx(0.15)
    assert scheduling([late], 0.1) == {
        "p50_s": pytest.approx(0.3),
        "p99_s": pytest.approx(0.3),
        "max_s": pytest.approx(0.3),
        "limit_s": 0.1,
        "kept_up": False,
    }


def test_tokens_that_come_together_share_their_time() -> None:
    pair = record(0.0, [0.2, 0.6], [2, 6])
    assert pair.tpot_s == pytest.approx(0.1)
    assert record(0.0, [0.2], [6]).tpot_s is None
    assert SLO.met_by(record(0.0, [0.2], [6])) == (True, True)


def test_only_completed_requests_can_be_good() -> None:
    lost = record(0.0, [0.1], outcome=Outcome.LOST)
    unfinished = record(0.0, [], outcome=Outcome.UNFINISHED)
    slow = record(0.0, [0.1, 0.4])
    figures = attainment([record(0.0, [0.1, 0.2]), lost, slow, unfinished], SLO, 2.0)
    assert figures == {
        "attainment": pytest.approx(1 / 3),
        "ttft_attainment": pytest.approx(2 / 3),
        "tpot_attainment": pytest.approx(1 / 3),
        "goodput": 0.5,
    }


@pytest.mark.parametrize(
    ("what", "token_s", "expected"),
    [
        ("all in time", [0.5, 0.6, 0.7], (0, 3)),
        ("early tokens are slack for late ones", [0.1, 0.6, 0.7], (0, 3)),
        ("slack does not last for ever", [0.4, 0.5, 0.85], (2, 4)),
        ("a late first token misses its own and what fits into the wait", [0.75], (3, 3)),
        ("the reader starts afresh after a miss", [0.5, 0.81, 0.91], (3, 5)),
        ("no token, no deadline", [], (0, 0)),
    ],
)
def test_token_deadlines(what: str, token_s: list[float], expected: tuple[int, int]) -> None:
    assert deadlines(record(0.0, token_s), 0.5, 0.1) == expected, what


def test_tokens_of_one_answer_give_slack_for_the_next() -> None:
    assert deadlines(record(0.0, [0.5, 0.85], [4, 5]), 0.5, 0.1) == (0, 5)


def test_a_lost_request_missed_what_it_owed() -> None:
    lost = record(0.0, [], outcome=Outcome.LOST)
    figures = fluidity([record(0.0, [0.1, 0.2, 0.3, 0.4]), lost], SLO)
    assert figures == {"index": 0.5, "mean": 0.5, "p10": 0.0}
    assert fluidity([lost], Slo(ttft_s=1.0)) is None


def test_worker_seconds_follow_the_pools() -> None:
    pools = [(1.0, 1, 1), (4.0, 1, 3), (8.0, None, 2)]
    assert worker_seconds(pools, Span(0.0, 10.0)) == {"prefill": 8.0, "decode": 20.0, "total": 28.0}
    assert worker_seconds(pools, Span(5.0, 6.0)) == {"prefill": 1.0, "decode": 3.0, "total": 4.0}
    assert worker_seconds([], Span(0.0, 10.0)) is None


def test_a_summary_adds_up() -> None:
    records = [record(0.0, [0.1, 0.2]), record(1.0, [1.1, 1.2]), record(2.0, [2.1, 2.5])]
    records.append(record(3.0, [3.1], outcome=Outcome.TRUNCATED))
    records.append(record(4.0, [], outcome=Outcome.LOST))
    terms = Terms(SLO, worker_hour_price=36.0)
    summary = summarise(records, Span(0.0, 10.0), terms, [(0.0, 1, 1)])
    counts = {key: summary[key] for key in ("requests", "completed", "lost", "truncated", "wrong")}
    assert counts == {"requests": 5, "completed": 3, "lost": 1, "truncated": 1, "wrong": 0}
    assert summary["offered_rate"] == 1.0 and summary["request_rate"] == 0.3
    assert summary["output_token_rate"] == pytest.approx(0.7)
    assert summary["prompt_token_rate"] == pytest.approx(0.9)
    assert summary["itl_s"]["max"] == pytest.approx(0.4)
    assert summary["normalised_s"]["p50"] == pytest.approx(0.1)
    assert summary["slo"]["goodput"] == pytest.approx(0.2)
    assert summary["worker_seconds"]["total"] == 20.0 and summary["cost"] == pytest.approx(0.2)


def test_a_run_without_a_good_request_still_has_a_summary() -> None:
    summary = summarise([], Span(0.0, 0.0), Terms(SLO))
    assert summary["ttft_s"] is None and summary["slo"]["attainment"] is None
