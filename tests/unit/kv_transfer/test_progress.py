"""Blocks are given out when a step has finished them: each once, in order, never before."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.names import HandoffId
from kv_transfer.progress import Growth, Progress

H = HandoffId("h")


def test_what_is_computed_when_a_step_begins_is_finished() -> None:
    progress = Progress([16, 32])
    progress.begin("r", H)
    # The first chunk is 40 tokens: three blocks of 16, two of 32.
    assert progress.step("r", ([1, 2, 3], [7, 8]), 0) is None
    assert progress.step("r", ([4, 5], [9]), 40) == Growth(H, ((1, 2), (7,)))
    assert progress.step("r", None, 40) is None, "a step without it"
    assert progress.step("r", None, 80) == Growth(H, ((3, 4, 5), (8,)))
    assert progress.end("r") == H
    assert progress.step("r", None, 96) is None and progress.end("r") is None


def test_a_prefix_in_the_cache_is_finished_at_once() -> None:
    progress = Progress([16])
    progress.begin("r", H)
    assert progress.step("r", ([1, 2, 3],), 32) == Growth(H, ((1, 2),))


def test_after_a_preemption_it_begins_anew() -> None:
    progress = Progress([16])
    progress.begin("r", H)
    progress.step("r", ([1, 2],), 0)
    assert progress.step("r", None, 32) == Growth(H, ((1, 2),))
    assert progress.revoke("r") == H
    assert progress.step("r", ([8, 9, 10],), 16) == Growth(H, ((8,),))
    assert progress.step("r", None, 48) == Growth(H, ((9, 10),))


def test_a_state_is_finished_with_the_prompt_only() -> None:
    progress = Progress([16, None])
    progress.begin("r", H)
    assert progress.step("r", ([1, 2], [7]), 32) == Growth(H, ((1, 2), ()))


def test_others_are_not_followed() -> None:
    progress = Progress([16])
    assert progress.step("r", ([1],), 16) is None
    assert progress.revoke("r") is None and progress.end("r") is None


@given(st.lists(st.integers(0, 40), max_size=12), st.sampled_from([4, 16]))
def test_every_whole_block_comes_once_and_in_order(chunks: list[int], block_size: int) -> None:
    progress, num_computed, num_allocated = Progress([block_size]), 0, 0
    given_out: list[int] = []
    progress.begin("r", H)
    for chunk in [*chunks, 0]:
        needed = -(-(num_computed + chunk) // block_size)
        new = list(range(100 + num_allocated, 100 + max(needed, num_allocated)))
        growth = progress.step("r", (new,) if new else None, num_computed)
        num_allocated = max(needed, num_allocated)
        given_out += growth.block_ids[0] if growth else ()
        assert len(given_out) == num_computed // block_size
        num_computed += chunk
    assert given_out == list(range(100, 100 + len(given_out)))
