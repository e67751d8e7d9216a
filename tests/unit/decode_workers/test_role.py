"""The decode role as a table: what it makes of messages, engine outputs and cancels."""

import pytest

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import (
    Decode,
    Failed,
    Offer,
    Prefill,
    PrefillStats,
    Receipt,
    Rejected,
    Tokens,
)
from cluster.names import FinishReason, HandoffId, RequestId, WorkerId
from cluster.roles import Ending, Report
from decode_workers.role import DecodeRole

R = RequestId("r")
OFFER = Offer(HandoffId("h"), WorkerId("w"), 1, "f", ("tcp://a:1",), 3, 1, 30.0)
STATS, RECEIPT = PrefillStats(3, 1, 0, 2), Receipt(1, 10, 10, 0.1)
ABORT, NOTHING = Ending(abort=(R,)), Ending()


def accepted(offer: Offer | None = OFFER) -> DecodeRole:
    role = DecodeRole()
    role.accept(Decode(R, (1, 2, 3), {"max_tokens": 5}, offer, None, 0))
    return role


@pytest.mark.parametrize("offer", [OFFER, None])
def test_a_stream_pulls_its_offer_or_computes(offer: Offer | None) -> None:
    message = Decode(R, (1, 2, 3), {"max_tokens": 5}, offer, "salt", 2, 7, True)
    assert DecodeRole().accept(message) == EngineRequest(
        R, (1, 2, 3), {"max_tokens": 5}, None, offer, "salt", 2, 7, True
    )


def test_a_prompt_to_hold_is_not_this_roles() -> None:
    role = DecodeRole()
    message = Prefill(R, HandoffId("h"), (1,), None, 0)
    assert role.accept(message) == Rejected(R, "this worker is in the decode role")
    assert role.cancel(R) == NOTHING


@pytest.mark.parametrize(
    ("label", "output", "expected"),
    [
        (
            "first tokens",
            EngineOutput(R, (4,), stats=STATS),
            Report(Tokens(R, (4,), stats=STATS)),
        ),
        (
            "everything an output can carry",
            EngineOutput(
                R, (4,), FinishReason.STOP, "</s>", {"a": 1}, {"b": 2}, STATS, None, RECEIPT
            ),
            Report(
                Tokens(R, (4,), FinishReason.STOP, "</s>", {"a": 1}, {"b": 2}, STATS, RECEIPT),
                is_last=True,
            ),
        ),
        (
            "the end",
            EngineOutput(R, (4,), FinishReason.LENGTH),
            Report(Tokens(R, (4,), FinishReason.LENGTH), is_last=True),
        ),
        (
            "a hand-off that failed",
            EngineOutput(R, (), FinishReason.ERROR, handoff_error="checksum"),
            Report(Failed(R, "handoff", "checksum"), is_last=True),
        ),
        (
            "an engine error",
            EngineOutput(R, (), FinishReason.ERROR),
            Report(
                Failed(R, "engine", "the engine could not go on with the request"), is_last=True
            ),
        ),
    ],
)
def test_reports(label: str, output: EngineOutput, expected: Report) -> None:
    assert accepted().report(output) == expected, label


@pytest.mark.parametrize(
    ("label", "outputs", "endings"),
    [
        ("waiting", [], [ABORT, NOTHING]),
        ("streaming", [EngineOutput(R, (4,))], [ABORT, NOTHING]),
        ("finished", [EngineOutput(R, (4,), FinishReason.LENGTH)], [NOTHING]),
        ("failed", [EngineOutput(R, (), FinishReason.ERROR)], [NOTHING]),
    ],
)
def test_cancels(label: str, outputs: list[EngineOutput], endings: list[Ending]) -> None:
    role = accepted()
    for output in outputs:
        role.report(output)
    assert [role.cancel(R) for _ in endings] == endings, label


def test_tokens_are_numbered_so_that_a_lost_message_shows() -> None:
    role = DecodeRole()
    role.accept(Decode(R, (1,), {}, None, None, 0))
    outputs = [
        EngineOutput(R, (4, 5)),
        EngineOutput(R, (6,)),
        EngineOutput(R, (), FinishReason.STOP),
    ]
    messages = [role.report(output).message for output in outputs]
    assert [m.num_before for m in messages if isinstance(m, Tokens)] == [0, 2, 3]
