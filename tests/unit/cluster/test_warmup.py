"""What counts as a proven hand-off, and the prompts that prove it."""

import pytest

from cluster.config import ModelSection
from cluster.messages import Receipt
from cluster.names import WorkerId
from cluster.warmup import find_fault, warmup_prompt

PAIR = (WorkerId("prefill-1"), WorkerId("decode-1"))
GOOD = Receipt(num_blocks=3, received_bytes=99, produced_bytes=99, transfer_s=0.1)


@pytest.mark.parametrize(
    ("transferred", "receipt", "fault"),
    [
        (263, GOOD, None),
        (262, GOOD, None),
        (261, GOOD, "261 of 263 prompt tokens arrived"),
        (0, None, "0 of 263 prompt tokens arrived"),
        (262, None, "no KV bytes arrived"),
        (262, Receipt(0, 0, 0, 0.1), "no KV bytes arrived"),
        (262, Receipt(3, 99, 98, 0.1), "98 KV bytes sent, 99 received"),
    ],
)
def test_counts(transferred: int, receipt: Receipt | None, fault: str | None) -> None:
    assert find_fault(transferred, 263, receipt) == fault


def test_prompts_are_new_for_every_pair_and_attempt() -> None:
    other = (WorkerId("prefill-2"), WorkerId("decode-1"))
    prompts = [warmup_prompt(ModelSection(), p, n) for p in (PAIR, other) for n in "012"]
    assert len(set(prompts)) == 6
    assert prompts[0] == warmup_prompt(ModelSection(), PAIR, "0")


def test_prompts_cover_whole_blocks_and_fit_the_context() -> None:
    assert len(warmup_prompt(ModelSection(block_size=16), PAIR, "0")) == 39
    assert len(warmup_prompt(ModelSection(max_model_len=100), PAIR, "0")) == 98
