"""Records: what a request became, in bounded memory, as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import PrefillStats, Receipt
from cluster.names import FinishReason, RequestId, Stage, WorkerId
from router.policy import Placed
from router.records import Outcome, PromptTokens, Records, RequestRecord
from router.recovery import Cause
from router.timeline import Event

PLACED = Placed(WorkerId("d0"), WorkerId("p0"), 100, True, "idle")
STATS = PrefillStats(100, 1, 30, 69)


def open_record(records: Records, exchange_id: str = "x", number: int = 0) -> RequestRecord:
    return records.open(exchange_id, RequestId(f"{exchange_id}-{number}"), 100, 10.0)


def test_a_request_that_went_well_can_be_read_from_its_document() -> None:
    records = Records(10)
    record = open_record(records)
    record.record_placed(PLACED, 10.5)
    record.timeline.stamp(Event.PREFILLED, 11.0)
    record.prompt_tokens = PromptTokens.of(STATS, expects_handoff=True)
    record.receipt = Receipt(1, 4096, 4096, 0.25)
    record.timeline.record_tokens(1, 12.0)
    record.timeline.stamp(Event.FIRST_TOKEN, 12.0)
    records.finish(record, Outcome.STOP, None, 13.0)
    exchange = records.get("x")
    assert exchange is not None
    document = json.loads(json.dumps(exchange.as_document()))
    (sequence,) = document["sequences"]
    assert document["exchange_id"] == "x"
    assert sequence["stage"] == "finished" and sequence["outcome"] == "stop"
    assert (sequence["prefill_worker"], sequence["decode_worker"]) == ("p0", "d0")
    assert sequence["prompt_tokens"] == {
        "transferred": 69,
        "reused": 30,
        "recomputed": 1,
        "local": 0,
    }
    assert sequence["bytes_agree"] is True and sequence["received_bytes"] == 4096
    assert sequence["ttft_s"] == 2.0 and sequence["e2e_s"] == 3.0
    assert sequence["error"] is None


def test_what_decode_computes_is_recomputed_only_if_a_handoff_was_due() -> None:
    computed = PrefillStats(100, 100, 0, 0)
    assert PromptTokens.of(computed, expects_handoff=True) == PromptTokens(recomputed=100)
    assert PromptTokens.of(computed, expects_handoff=False) == PromptTokens(local=100)


def test_bytes_agree_or_not_or_nothing_was_pulled() -> None:
    record = open_record(Records(1))
    assert record.bytes_agree is None
    record.receipt = Receipt(1, 10, 20, 0.1)
    assert record.bytes_agree is False


def test_every_placement_keeps_its_cause() -> None:
    records = Records(10)
    record = open_record(records)
    record.record_placed(PLACED, 10.0)
    record.record_setback(Cause.HANDOFF_FAILED, "stalled", 11.0)
    stages = [record.stage]
    record.record_placed(Placed(WorkerId("d0"), None, 100, True, "last resort"), 11.0)
    assert [*stages, record.stage] == [Stage.QUEUED, Stage.PREFILL]
    attempts = record.as_document()["attempts"]
    assert attempts == [
        {
            "prefill_worker": "p0",
            "decode_worker": "d0",
            "reason": "idle",
            "cause": "handoff_failed",
            "detail": "stalled",
        },
        {
            "prefill_worker": None,
            "decode_worker": "d0",
            "reason": "last resort",
            "cause": None,
            "detail": None,
        },
    ]
    assert record.prefill_worker is None


def test_sequences_of_one_exchange_are_together() -> None:
    records = Records(10)
    for number in range(3):
        open_record(records, "x", number)
    exchange = records.get("x")
    assert exchange is not None
    assert [record.request_id for record in exchange.sequences] == ["x-0", "x-1", "x-2"]
    assert records.get("y") is None


def test_how_it_ended_first_stands() -> None:
    records = Records(10)
    record = open_record(records)
    records.finish(record, Outcome.DEADLINE, "late", 11.0)
    records.finish(record, Outcome.CANCELLED, "gone", 12.0)
    assert record.outcome is Outcome.DEADLINE and record.timeline.e2e_s == 1.0
    assert records.totals()["outcomes"] == {"deadline": 1}


def test_open_records_are_never_forgotten() -> None:
    records = Records(1)
    slow = open_record(records, "slow")
    for number in range(5):
        records.finish(open_record(records, f"fast-{number}"), Outcome.STOP, None, 11.0)
    exchange = records.get("slow")
    assert exchange is not None and exchange.sequences == [slow]
    assert [records.get(f"fast-{number}") is None for number in range(5)] == [True] * 4 + [False]
    assert repr(records) == "<Records open=1 finished=1>"


def test_totals_add_up_and_survive_forgetting() -> None:
    records = Records(1)
    for number in range(3):
        record = open_record(records, f"x{number}")
        record.record_placed(PLACED, 10.0)
        record.record_setback(Cause.PREFILL_LOST, "gone", 10.0)
        record.prompt_tokens = PromptTokens.of(STATS, expects_handoff=True)
        record.receipt = Receipt(1, 10, 10 + number, 0.1)
        records.finish(record, Outcome.LENGTH, None, 11.0)
    open_record(records, "open")
    assert records.totals() == {
        "open": {"queued": 1},
        "outcomes": {"length": 3},
        "setbacks": {"prefill_lost": 3},
        "prompt_tokens": {"transferred": 207, "reused": 90, "recomputed": 3, "local": 0},
        "handoff_bytes": {"received": 30, "produced": 33, "mismatches": 2},
    }


def test_latest_are_those_in_flight_then_the_newest() -> None:
    records = Records(10)
    for number in range(3):
        records.finish(open_record(records, f"done-{number}"), Outcome.STOP, None, 11.0)
    open_record(records, "open")
    assert [r.exchange_id for r in records.latest(3)] == ["open", "done-2", "done-1"]


def test_finished_ones_have_half_of_the_latest_if_there_are_so_many() -> None:
    records = Records(10)
    for number in range(3):
        records.finish(open_record(records, f"done-{number}"), Outcome.STOP, None, 11.0)
    for number in range(9):
        open_record(records, f"open-{number}")
    names = ["open-8", "open-7", "done-2", "done-1"]
    assert [r.exchange_id for r in records.latest(4)] == names
    assert sum(r.outcome is None for r in records.latest(10)) == 7, "what finished ones leave"


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (FinishReason.STOP, Outcome.STOP),
        (FinishReason.LENGTH, Outcome.LENGTH),
        (FinishReason.REPETITION, Outcome.REPETITION),
        (FinishReason.ABORT, Outcome.ERROR),
        (FinishReason.ERROR, Outcome.ERROR),
    ],
)
def test_outcome_of_a_finish(reason: FinishReason, outcome: Outcome) -> None:
    assert Outcome.of(reason) is outcome


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.integers(1, 5))
def test_memory_is_bounded_by_the_limit(steps: list[tuple[str, bool]], limit: int) -> None:
    records = Records(limit)
    opened: list[RequestRecord] = []
    for exchange_id, is_opening in steps:
        if is_opening or not opened:
            opened.append(open_record(records, exchange_id, len(opened)))
        else:
            records.finish(opened.pop(0), Outcome.STOP, None, 11.0)
    kept = [exchange for name in "abc" if (exchange := records.get(name)) is not None]
    assert all(exchange.sequences for exchange in kept)
    num_kept = sum(len(exchange.sequences) for exchange in kept)
    assert len(opened) <= num_kept <= len(opened) + limit
