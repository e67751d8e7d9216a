"""A request's record as spans, and what a router's metrics make of it."""

import pytest

from cluster.messages import Receipt
from cluster.metrics import REGISTRIES
from cluster.names import Component, RequestId, WorkerId
from router.measures import Measures, Objectives
from router.policy import Placed
from router.records import Outcome, PromptTokens, Records, RequestRecord
from router.recovery import Cause
from router.spans import spans_of
from router.timeline import Event

HANDOFF = Placed(WorkerId("d0"), WorkerId("p0"), 100, True, "idle")
LOCAL = Placed(WorkerId("d1"), None, 100, True, "last resort")


def open_record() -> tuple[Records, RequestRecord]:
    records = Records(10)
    return records, records.open("x", RequestId("r"), 100, 10.0)


def served(outcome: Outcome = Outcome.LENGTH) -> RequestRecord:
    """A request that took 1 s to its first token and 0.1 s for each of two more."""
    records, record = open_record()
    record.record_placed(HANDOFF, 10.25)
    record.timeline.stamp(Event.PREFILLED, 10.75)
    record.prompt_tokens = PromptTokens(transferred=99, recomputed=1)
    record.receipt = Receipt(7, 4096, 4096, 0.125)
    record.timeline.stamp(Event.DECODING, 11.0)
    record.timeline.record_tokens(1, 11.0)
    record.timeline.stamp(Event.FIRST_TOKEN, 11.0)
    record.timeline.record_tokens(2, 11.2)
    records.finish(record, outcome, None, 11.25)
    return record


def test_the_spans_are_the_stages() -> None:
    root, stages = spans_of(served())
    assert (root.name, root.start_s, root.end_s, root.error) == ("router", 0.0, 1.25, None)
    assert root.attributes["tandem.outcome"] == "length"
    assert root.attributes["gen_ai.usage.input_tokens"] == 100
    assert root.attributes["gen_ai.usage.output_tokens"] == 3
    assert [(s.name, s.start_s, s.end_s) for s in stages] == [
        ("queue", 0.0, 0.25),
        ("prefill", 0.25, 0.75),
        ("transfer", 0.75, 1.0),
        ("decode", 1.0, 1.25),
    ]
    queue, prefill, transfer, decode = stages
    assert queue.attributes == {}
    assert prefill.attributes == {"tandem.worker": "p0", "tandem.is_local": False}
    assert transfer.attributes["tandem.bytes"] == 4096
    assert decode.attributes == {"tandem.worker": "d0", "tandem.output_tokens": 3}


def test_an_attempt_that_failed_has_its_cause() -> None:
    records, record = open_record()
    record.record_placed(HANDOFF, 10.1)
    record.timeline.stamp(Event.PREFILLED, 10.2)
    record.record_setback(Cause.HANDOFF_FAILED, "no data", 10.5)
    record.record_placed(LOCAL, 10.5)
    record.timeline.stamp(Event.DECODING, 11.0)
    records.finish(record, Outcome.STOP, None, 12.0)
    root, stages = spans_of(record)
    assert root.error is None and root.attributes["tandem.attempts"] == 2
    names = ["queue", "prefill", "transfer", "queue", "prefill", "decode"]
    assert [span.name for span in stages] == names
    assert [span.error for span in stages if span.error] == ["handoff_failed: no data"]
    assert stages[4].attributes == {"tandem.worker": "d1", "tandem.is_local": True}


def test_a_request_never_placed_only_queued() -> None:
    records, record = open_record()
    records.finish(record, Outcome.REJECTED, "no decode worker is ready", 10.5)
    root, stages = spans_of(record)
    assert root.error == "no decode worker is ready"
    assert [(span.name, span.end_s) for span in stages] == [("queue", 0.5)]


def slo_counts(measures: Measures, *records: RequestRecord) -> list[float]:
    """Return how much all, and those that met ttft, tbt and both, grow by these records."""

    def read() -> list[float]:
        value = REGISTRIES[Component.ROUTER].get_sample_value
        met = [value("tandem_slo_met_total", {"objective": o}) for o in ("ttft", "tbt", "both")]
        return [each or 0.0 for each in (value("tandem_slo_requests_total"), *met)]

    before = read()
    for record in records:
        measures.end(record)
    return [after - was for after, was in zip(read(), before, strict=True)]


@pytest.mark.parametrize(
    ("ttft_s", "tbt_s", "grown"),
    [
        (1.0, 0.11, [1, 1, 1, 1]),
        (0.9, 0.11, [1, 0, 1, 0]),
        (1.0, 0.09, [1, 1, 0, 0]),
        (None, 0.09, [1, 1, 0, 0]),
        (None, None, [0, 0, 0, 0]),
    ],
)
def test_requests_are_held_against_the_objectives(
    ttft_s: float | None, tbt_s: float | None, grown: list[float]
) -> None:
    assert slo_counts(Measures(Objectives(ttft_s, tbt_s)), served()) == grown


def test_what_fails_has_met_nothing_and_what_the_client_ends_is_not_judged() -> None:
    measures = Measures(Objectives(9.0, 9.0))
    ended = [served(o) for o in (Outcome.ERROR, Outcome.DEADLINE, Outcome.REJECTED)]
    assert slo_counts(measures, *ended) == [3, 0, 0, 0]
    left = [served(o) for o in (Outcome.CANCELLED, Outcome.INVALID)]
    assert slo_counts(measures, *left) == [0, 0, 0, 0]
