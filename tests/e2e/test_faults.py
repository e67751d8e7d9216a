"""Negative control: wrong KV bytes do change answers, and checksums keep them out."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.prompts import prompt_of
from tests.served import Served, tandem

pytestmark = pytest.mark.alone

PROMPTS = [prompt_of(length, seed=7000 + length) for length in (300, 900, 1500)]
GREEDY: dict[str, Any] = {"max_tokens": 48, "ignore_eos": True}
DAMAGED: dict[str, Any] = {
    "model__dtype": "float32",
    "model__chunk_tokens": 256,
    "model__kv_cache_gib": 0.5,
    "handoff__fault": "corrupt_received_block",
    # What is read in place has no way on which it could be damaged.
    "handoff__transports": "shm,tcp",
    # Or no worker would ever be listed: the warm-up hand-off is damaged too.
    "cluster__warmup": False,
}


@pytest.fixture(scope="module")
def expected(monolithic: Served) -> list[list[int]]:
    return [monolithic.tokens(prompt, **GREEDY) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def checked() -> Iterator[Served]:
    with tandem("test-checked", **DAMAGED) as served:
        yield served


def test_damaged_blocks_are_refused_and_the_answer_is_right(
    checked: Served, expected: list[list[int]]
) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        answer = checked.complete(prompt, return_token_ids=True, **GREEDY)
        assert answer["choices"][0]["token_ids"] == tokens
        (sequence,) = checked.record(answer["headers"]["x-request-id"])["sequences"]
        causes = [attempt["cause"] for attempt in sequence["attempts"]]
        assert causes == ["handoff_failed", "handoff_failed", None]
        assert "checksum mismatch" in sequence["attempts"][0]["detail"]
        assert sequence["attempts"][-1]["prefill_worker"] is None


def test_without_checksums_damaged_blocks_change_the_answer(
    expected: list[list[int]],
) -> None:
    with tandem("test-unchecked", handoff__checksum=False, **DAMAGED) as unchecked:
        answers = [unchecked.tokens(prompt, **GREEDY) for prompt in PROMPTS]
        (sequence,) = unchecked.client.get("/admin/requests?limit=1").json()["requests"]
        assert sequence["attempts"][-1]["cause"] is None
    assert answers != expected
