"""A run fails for lost requests and for prompts that decode computed again."""

from typing import Any

from deploy.report import Replayed, faults, percentile, rows


def record(**prompt_tokens: int) -> dict[str, Any]:
    sequence = {"prompt_tokens": prompt_tokens, "received_bytes": 10, "produced_bytes": 10}
    return {"sequences": [sequence]}


def replayed(**changes: Any) -> Replayed:
    fields: dict[str, Any] = {
        "prompt_tokens": 100,
        "output_tokens": 3,
        "scheduled_at": 1.0,
        "token_times": [1.1, 1.2, 1.4],
        "received_tokens": 3,
        "record": record(transferred=99, reused=0, recomputed=1, local=0),
    }
    return Replayed(**{**fields, **changes})


def test_a_good_run_has_no_faults() -> None:
    assert faults([replayed(), replayed()]) == []


def test_every_kind_of_fault_is_named() -> None:
    runs = [
        replayed(error="HTTP 503: no"),
        replayed(received_tokens=2),
        replayed(record=record(transferred=0, reused=0, recomputed=100, local=0)),
        replayed(record=None),
    ]
    assert faults(runs) == [
        "request 0: HTTP 503: no",
        "request 1: 2 of 3 tokens",
        "request 2: decode recomputed 100 prompt tokens",
        "request 3: the router has no record of it",
    ]


def test_the_report_adds_up() -> None:
    figures = dict(rows([replayed(), replayed(error="gone", record=None)], duration_s=2.0))
    assert figures["requests"] == "2"
    assert figures["lost"] == "1"
    assert figures["TTFT p50 / p90 / p99"] == "100.0 / 100.0 / 100.0 ms"
    assert figures["inter-token p50 / p90 / p99"] == "100.0 / 200.0 / 200.0 ms"
    assert figures["KV bytes handed over"] == "10 received, 10 sent"
    assert figures["prompt tokens transferred"] == "99"
    assert figures["prompt tokens recomputed on decode"] == "1"


def test_a_run_without_a_served_request_still_reports() -> None:
    figures = dict(rows([replayed(error="gone", token_times=[], record=None)], duration_s=1.0))
    assert figures["TTFT p50 / p90 / p99"] == "-"


def test_percentiles_are_nearest_rank() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50.0, 90.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0
