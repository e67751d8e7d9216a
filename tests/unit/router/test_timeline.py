"""Latencies follow from stamps, by the definitions the README gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.names import Stage
from router.timeline import STAGE_AFTER, Event, Timeline


def walk(*stamps: tuple[Event, float], arrived_s: float = 1000.0) -> Timeline:
    timeline = Timeline(arrived_s)
    for event, at_s in stamps:
        timeline.stamp(event, arrived_s + at_s)
    return timeline


def test_a_request_without_incident() -> None:
    timeline = walk((Event.PLACED, 0.5), (Event.PREFILLED, 2.0))
    for at_s, num_tokens in [(3.0, 1), (3.5, 1), (5.0, 2)]:
        if timeline.record_tokens(num_tokens, 1000.0 + at_s) is None:
            timeline.stamp(Event.DECODING, 1000.0 + at_s)
            timeline.stamp(Event.FIRST_TOKEN, 1000.0 + at_s)
    timeline.stamp(Event.FINISHED, 1006.0)
    assert timeline.queue_s == 0.5
    assert timeline.prefill_s == 1.5
    assert timeline.transfer_s == 1.0
    assert timeline.ttft_s == 3.0
    assert timeline.tpot_s == pytest.approx(2.0 / 3)
    assert timeline.max_gap_s == 1.5
    assert timeline.e2e_s == 6.0
    assert timeline.stage is Stage.FINISHED


def test_the_handoff_goes_on_after_prefills_first_token() -> None:
    timeline = walk((Event.PLACED, 0.5), (Event.PREFILLED, 2.0), (Event.FIRST_TOKEN, 2.0))
    stages = [timeline.stage]
    timeline.stamp(Event.DECODING, 1003.0)
    stages.append(timeline.stage)
    assert stages == [Stage.TRANSFER, Stage.DECODE]
    assert (timeline.ttft_s, timeline.transfer_s) == (2.0, 1.0)


def test_nothing_is_known_before_it_happened() -> None:
    timeline = Timeline(5.0)
    assert timeline.stage is Stage.QUEUED
    document = timeline.as_document()
    assert {value for key, value in document.items() if key.endswith("_s")} == {None}


def test_one_token_has_no_time_per_output_token() -> None:
    timeline = walk((Event.PLACED, 0.0))
    timeline.record_tokens(1, 1001.0)
    timeline.stamp(Event.FIRST_TOKEN, 1001.0)
    assert timeline.ttft_s == 1.0 and timeline.tpot_s is None and timeline.max_gap_s is None


def test_an_answer_without_tokens_is_not_a_first_token() -> None:
    timeline = walk((Event.PLACED, 0.0))
    assert timeline.record_tokens(0, 1001.0) is None
    assert timeline.last_token_s is None
    assert timeline.record_tokens(1, 1002.0) is None
    assert timeline.record_tokens(1, 1002.5) == 0.5


def test_after_a_setback_the_last_attempt_counts_but_the_queue_is_the_first() -> None:
    timeline = walk(
        (Event.PLACED, 1.0),
        (Event.PREFILLED, 2.0),
        (Event.SET_BACK, 5.0),
        (Event.PLACED, 6.0),
        (Event.PREFILLED, 6.5),
        (Event.DECODING, 7.0),
        (Event.FIRST_TOKEN, 7.0),
    )
    assert (timeline.queue_s, timeline.prefill_s, timeline.transfer_s) == (1.0, 0.5, 0.5)
    assert timeline.ttft_s == 7.0


def test_a_local_prefill_after_a_failed_handoff_has_no_transfer() -> None:
    timeline = walk(
        (Event.PLACED, 1.0),
        (Event.PREFILLED, 2.0),
        (Event.SET_BACK, 5.0),
        (Event.PLACED, 5.0),
        (Event.DECODING, 7.0),
    )
    assert timeline.transfer_s is None and timeline.prefill_s == 1.0


def test_every_other_event_leads_to_a_stage() -> None:
    assert set(STAGE_AFTER) == set(Event) - {Event.FIRST_TOKEN}
    assert set(STAGE_AFTER.values()) == set(Stage)


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.001, 10)), min_size=1, max_size=20))
def test_latencies_are_consistent(answers: list[tuple[int, float]]) -> None:
    timeline, now = Timeline(0.0), 0.0
    gaps = []
    for num_tokens, wait_s in answers:
        now += wait_s
        gap_s = timeline.record_tokens(num_tokens, now)
        if gap_s is None:
            timeline.stamp(Event.FIRST_TOKEN, now)
        else:
            gaps.append(gap_s)
    timeline.stamp(Event.FINISHED, now)
    assert timeline.num_tokens == sum(num for num, _ in answers)
    assert timeline.ttft_s is not None and timeline.e2e_s is not None
    assert timeline.ttft_s + sum(gaps) == pytest.approx(timeline.e2e_s)
    assert timeline.max_gap_s == (max(gaps) if gaps else None)
    if timeline.tpot_s is not None:
        assert timeline.tpot_s <= (max(gaps) if gaps else 0.0) + 1e-9
