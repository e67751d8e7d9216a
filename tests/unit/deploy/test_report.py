"""A run fails for lost requests and for prompts that decode computed again."""

from typing import Any

from deploy.loadtest.words import Outcome, RequestRecord, Send
from deploy.report import faults, rows


def routed(**prompt_tokens: int) -> dict[str, Any]:
    sequence = {"prompt_tokens": prompt_tokens, "received_bytes": 10, "produced_bytes": 10}
    return {"sequences": [sequence]}


GOOD = routed(transferred=99, reused=0, recomputed=1, local=0)


def replayed(index: int = 0, error: str | None = None) -> RequestRecord:
    record = RequestRecord(index, Send(1.0, (1,) * 100, 3), 1.0, error=error)
    record.token_s, record.token_counts, record.received_tokens = [1.1, 1.2, 1.4], [1, 2, 3], 3
    record.outcome = Outcome.COMPLETED if error is None else Outcome.LOST
    return record


def test_a_good_run_has_no_faults() -> None:
    assert faults([replayed(0), replayed(1)], {0: GOOD, 1: GOOD}) == []


def test_every_kind_of_fault_is_named() -> None:
    runs = [replayed(0, "HTTP 503: no"), replayed(1), replayed(2)]
    assert faults(runs, {1: routed(transferred=0, reused=0, recomputed=100, local=0)}) == [
        "request 0: HTTP 503: no",
        "request 1: decode recomputed 100 prompt tokens",
        "request 2: the router has no record of it",
    ]


def test_the_report_adds_up() -> None:
    figures = dict(rows([replayed(0), replayed(1, "gone")], {0: GOOD}, duration_s=2.0))
    assert figures["requests"] == "2"
    assert figures["lost"] == "1"
    assert figures["TTFT p50 / p90 / p99"] == "100.0 / 100.0 / 100.0 ms"
    assert figures["inter-token p50 / p90 / p99"] == "100.0 / 200.0 / 200.0 ms"
    assert figures["KV bytes handed over"] == "10 received, 10 sent"
    assert figures["prompt tokens transferred"] == "99"
    assert figures["prompt tokens recomputed on decode"] == "1"


def test_a_run_without_a_served_request_still_reports() -> None:
    figures = dict(rows([replayed(0, "gone")], {}, duration_s=1.0))
    assert figures["TTFT p50 / p90 / p99"] == "-"
