"""Streamed answers counted right, in pieces of any size, and errors named."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.loadtest.sse import AnswerStream
from deploy.loadtest.words import RequestRecord, Send


def stream() -> AnswerStream:
    return AnswerStream(RequestRecord(0, Send(0.0, (1,) * 5, 3), 0.0), keeps_text=True)


def event(*choices: dict[str, Any], **fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices), **fields}).encode() + b"\n\n"


def usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}


CONTINUOUS = (
    event({"text": "a"}, usage=usage(1)),
    event({"text": ""}, usage=usage(2)),
    event({"text": "bc"}, usage=usage(4)),
    event({"text": "", "finish_reason": "length"}, usage=usage(4)),
    b": a comment\r\ndata: [DONE]\r\n\r\n",
)


def test_the_endpoints_own_count_goes_first() -> None:
    taken = stream()
    for number, data in enumerate(CONTINUOUS):
        taken.feed(data, float(number))
    record = taken.record
    assert taken.is_done and record.error is None
    assert (record.token_s, record.token_counts) == ([0.0, 1.0, 2.0], [1, 2, 4])
    assert (record.received_tokens, record.counted_prompt_tokens, record.text) == (4, 5, "abc")


@given(st.integers(1, 40))
def test_pieces_may_be_cut_anywhere(size: int) -> None:
    taken, whole = stream(), b"".join(CONTINUOUS)
    for start in range(0, len(whole), size):
        taken.feed(whole[start : start + size], 1.0)
    assert taken.is_done and taken.record.token_counts == [1, 2, 4]


@pytest.mark.parametrize(
    ("choices", "counts"),
    [
        ([{"text": "a", "token_ids": [7, 8]}, {"text": "", "token_ids": [9]}], [2, 3]),
        ([{"text": "a"}, {"text": ""}, {"text": "b"}], [1, 2]),
        ([{"delta": {"role": "assistant", "content": ""}}, {"delta": {"content": "b"}}], [1]),
        ([{"delta": {"reasoning_content": "hm"}}, {"delta": {"content": "b"}}], [1, 2]),
    ],
)
def test_without_it_ids_or_answers_are_counted(choices: list[Any], counts: list[int]) -> None:
    taken = stream()
    for choice in choices:
        taken.feed(event(choice), 1.0)
    assert taken.record.token_counts == counts
    # The last word is the endpoint's: an answer without text may have been a token.
    taken.feed(event(usage=usage(9)), 2.0)
    assert taken.record.received_tokens == taken.record.token_counts[-1] == 9
    assert taken.record.token_s[-1] == 1.0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'data: {"error": {"message": "the engine died"}}\n', "the endpoint says: "),
        (b'data: {"choices": [{]}\n', "an answer is not one: "),
        (b'data: {"choices": 7}\n', "an answer is not one: Expected `array`"),
    ],
)
def test_what_is_no_answer_is_named(data: bytes, expected: str) -> None:
    taken = stream()
    taken.feed(data, 1.0)
    assert taken.record.error is not None and taken.record.error.startswith(expected)
