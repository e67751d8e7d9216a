"""Goodput from per-request data: what was measured decides, for whatever objectives."""

import pytest

from deploy.loadtest.words import Document, Slo
from tests.benchmarks.objectives import Cell, Goodput, cells_of, goodput, score, worst_gap_s
from tests.run_documents import run_document

TIGHT, LOOSE = Slo(0.5, 0.03), Slo(5.0, 1.0)


def request(number: int, ttft_s: float, *gaps_s: float, is_lost: bool = False) -> Document:
    """Return a request of a run document, due at `number` seconds, one token per answer."""
    moments = [number + ttft_s]
    for gap_s in gaps_s:
        moments.append(moments[-1] + gap_s)
    return {
        "index": number,
        "scheduled_s": float(number),
        "sent_s": float(number),
        "end_s": moments[-1],
        "output_tokens": len(moments),
        "received_tokens": len(moments),
        "token_s": moments,
        "token_counts": list(range(1, len(moments) + 1)),
        "outcome": "lost" if is_lost else "completed",
        "error": None,
        "id": None,
    }


def cell(rate: float, num_good: int, num_slow: int = 0, stack: str = "ours") -> Cell:
    """Return a cell of requests that meet `TIGHT`, and of slow ones that meet `LOOSE` only."""
    good = [request(number, 0.4, 0.02, 0.03) for number in range(num_good)]
    slow = [request(number, 2.0, 0.02, 0.3) for number in range(num_slow)]
    return cells_of([(stack, "chat", rate, {"requests": [*good, *slow]})])[0]


def test_one_run_is_judged_by_any_objectives() -> None:
    measured = cell(1.0, 3, 1)
    shares = [measured.share(slo) for slo in (TIGHT, LOOSE, Slo(0.1), Slo(2.0), Slo(None, 0.16))]
    assert shares == [0.75, 1.0, 0.0, 1.0, 1.0]


def test_a_lost_request_meets_nothing() -> None:
    requests = [request(0, 0.1, 0.01), request(1, 0.1, 0.01, is_lost=True)]
    (measured,) = cells_of([("ours", "chat", 1.0, {"requests": requests})])
    assert measured.share(LOOSE) == 0.5 and len(measured.completed) == 1


def test_what_a_run_document_says_is_what_is_computed_from_it() -> None:
    document = run_document(num_requests=60)
    (measured,) = cells_of([("ours", "chat", 4.0, document)])
    settings = document["settings"]
    slo = Slo(settings["slo_ttft_s"], settings["slo_tpot_s"])
    assert measured.share(slo) == sum(r["met"] for r in document["requests"]) / 60


def test_rounds_of_a_cell_are_put_together() -> None:
    runs = [("ours", "chat", 1.0, {"requests": [request(n, 0.4)]}) for n in range(2)]
    assert [len(each.records) for each in cells_of(runs)] == [2]


def test_goodput_lies_where_the_share_falls_through() -> None:
    cells = [cell(1.0, 10), cell(2.0, 8, 2), cell(0.5, 9, 1)]
    found = goodput(cells, TIGHT)
    assert found.rate == pytest.approx(1.5) and str(found) == "1.50"


def test_goodput_has_no_end_within_rates_that_are_all_met() -> None:
    found = goodput([cell(1.0, 10), cell(2.0, 8, 2)], LOOSE)
    assert found == Goodput(2.0, is_least=True) and str(found) == "≥2.00"


def test_objectives_that_no_rate_meets_leave_nothing() -> None:
    found = goodput([cell(1.0, 1, 9)], TIGHT)
    assert found == Goodput(0.0) and str(found) == "0"


def test_the_worst_gap_is_between_answers() -> None:
    slow = cell(1.0, 0, 1).records[0]
    assert worst_gap_s(slow) == pytest.approx(0.3)
    assert (
        worst_gap_s(cells_of([("a", "b", 1.0, {"requests": [request(0, 1)]})])[0].records[0]) == 0
    )


def test_the_score_is_against_the_best_of_the_others() -> None:
    found = [
        {"ours": Goodput(2.0), "a": Goodput(1.0), "b": Goodput(0.0)},
        {"ours": Goodput(1.0), "a": Goodput(1.0), "b": Goodput(0.5)},
        {"ours": Goodput(1.0), "a": Goodput(0.0), "b": Goodput(1.5)},
        {"ours": Goodput(0.0), "a": Goodput(0.0), "b": Goodput(0.0)},
    ]
    counts = score(found, "ours")
    assert (counts.ahead, counts.level, counts.behind) == (1, 1, 1)
