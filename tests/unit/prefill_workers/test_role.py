"""The prefill role as a table: what it makes of messages, engine outputs and cancels."""

from dataclasses import replace

import pytest

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import (
    Decode,
    Failed,
    Offer,
    Offered,
    Prefill,
    Prefilled,
    PrefillStats,
    Rejected,
    Tokens,
)
from cluster.names import FinishReason, HandoffId, RequestId, WorkerId
from cluster.roles import Ending, Report
from prefill_workers.role import UNREAD, PrefillRole

R, H = RequestId("r"), HandoffId("h")
MESSAGE = Prefill(R, H, (1, 2, 3), "salt", 2)
SAMPLED = replace(MESSAGE, sampling={"max_tokens": 5})
OFFER = Offer(H, WorkerId("w"), 1, "f", ("tcp://a:1",), 3, 1, 30.0)
STATS = PrefillStats(3, 3, 0, 0)
DONE = EngineOutput(R, (9,), FinishReason.LENGTH, stats=STATS, offer=OFFER)
PREFILLED = Report(Prefilled(R, OFFER, STATS))
RELEASE, ABORT, NOTHING = Ending(release=(H,)), Ending(abort=(R,)), Ending()


def accepted(message: Prefill = MESSAGE) -> PrefillRole:
    role = PrefillRole()
    role.accept(message)
    return role


@pytest.mark.parametrize(("message", "sampling"), [(MESSAGE, UNREAD), (SAMPLED, {"max_tokens": 5})])
def test_a_prompt_is_computed_and_held(message: Prefill, sampling: dict[str, object]) -> None:
    assert PrefillRole().accept(message) == EngineRequest(
        R, (1, 2, 3), sampling, produce=H, cache_salt="salt", priority=2
    )


def test_a_stream_is_not_this_roles() -> None:
    role = PrefillRole()
    message = Decode(R, (1,), {}, None, None, 0)
    assert role.accept(message) == Rejected(R, "this worker is in the prefill role")
    assert role.cancel(R) == NOTHING


@pytest.mark.parametrize(
    ("label", "output", "expected"),
    [
        ("still computing", EngineOutput(R, (9,)), Report(None)),
        ("begun", EngineOutput(R, offer=OFFER), Report(Offered(R, OFFER))),
        ("held", DONE, PREFILLED),
        (
            "ended without an offer",
            EngineOutput(R, finish_reason=FinishReason.ABORT),
            Report(Failed(R, "engine", "prefill ended with abort"), is_last=True),
        ),
        (
            "an engine error",
            EngineOutput(R, finish_reason=FinishReason.ERROR),
            Report(Failed(R, "engine", "prefill ended with error"), is_last=True),
        ),
    ],
)
def test_reports(label: str, output: EngineOutput, expected: Report) -> None:
    assert accepted().report(output) == expected, label


@pytest.mark.parametrize(
    ("label", "output", "expected"),
    [
        ("more to come", DONE, Report(Prefilled(R, OFFER, STATS, first_token=9))),
        (
            "the first token is all",
            EngineOutput(R, (9,), FinishReason.LENGTH, stats=STATS),
            Report(Tokens(R, (9,), FinishReason.LENGTH, stats=STATS), is_last=True),
        ),
        (
            "the first token stops it",
            EngineOutput(R, (9,), FinishReason.STOP, 9, stats=STATS),
            Report(Tokens(R, (9,), FinishReason.STOP, 9, stats=STATS), is_last=True),
        ),
        (
            "an engine error",
            EngineOutput(R, finish_reason=FinishReason.ERROR),
            Report(Failed(R, "engine", "prefill ended with error"), is_last=True),
        ),
    ],
)
def test_reports_of_a_first_token(label: str, output: EngineOutput, expected: Report) -> None:
    assert accepted(SAMPLED).report(output) == expected, label


@pytest.mark.parametrize(
    ("label", "outputs", "endings"),
    [
        ("while computing: abort", [], [ABORT, NOTHING]),
        ("while held: release", [DONE], [RELEASE, NOTHING]),
        (
            "after an end without a hand-off: nothing",
            [EngineOutput(R, (9,), FinishReason.LENGTH, stats=STATS)],
            [NOTHING, NOTHING],
        ),
        (
            "after it failed: nothing",
            [EngineOutput(R, finish_reason=FinishReason.ERROR)],
            [NOTHING, NOTHING],
        ),
    ],
)
def test_cancels(label: str, outputs: list[EngineOutput], endings: list[Ending]) -> None:
    role = accepted()
    for output in outputs:
        role.report(output)
    assert [role.cancel(R) for _ in endings] == endings, label


def test_a_name_that_comes_again_after_its_cancel_is_another_prompt() -> None:
    role = accepted()
    role.cancel(R)
    role.accept(MESSAGE)
    assert role.report(DONE) == PREFILLED


def test_a_cancel_of_nothing_is_no_error() -> None:
    assert PrefillRole().cancel(R) == NOTHING
