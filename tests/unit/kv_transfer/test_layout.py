"""Layout arithmetic: what a fingerprint tells apart, and how reads cover blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.layout import BlockLayout, GroupLayout, Read, num_blocks_for, plan_reads

IDENTITY: dict[str, str | int] = {"model": "m", "dtype": "float32"}


def layout_of(*region_bytes: tuple[int, ...], block_size: int = 16) -> BlockLayout:
    return BlockLayout(tuple(GroupLayout(block_size, sizes) for sizes in region_bytes), IDENTITY)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_blocks_hold_their_tokens(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens, 16) == num_blocks


def test_fingerprint_is_of_the_content() -> None:
    same = BlockLayout(
        (GroupLayout(16, (8, 24)),), {"dtype": "float32", "model": "m"}
    )  # another order of keys
    assert layout_of((8, 24)).fingerprint == same.fingerprint
    assert len(same.fingerprint) == 32


def test_an_outline_says_what_the_fingerprint_is_of() -> None:
    layout = BlockLayout((GroupLayout(16, (8, 24)), GroupLayout(32, (40,))), IDENTITY)
    outline = layout.outline()
    facts = {"block_size": "16+32", "regions": "2+1", "block_bytes": "32+40"}
    assert outline.fingerprint == layout.fingerprint
    assert outline.facts == {**IDENTITY, **facts}


@pytest.mark.parametrize(
    "other",
    [
        BlockLayout((GroupLayout(16, (8, 24)),), {**IDENTITY, "dtype": "bfloat16"}),
        BlockLayout((GroupLayout(16, (8, 24)),), {**IDENTITY, "tensor_parallel": 2}),
        layout_of((24, 8)),
        layout_of((32,)),
        layout_of((8,), (24,)),
        layout_of((8, 24), (8, 24)),
        layout_of((8, 24), block_size=32),
    ],
)
def test_fingerprint_differs_with_anything_that_matters(other: BlockLayout) -> None:
    assert other.fingerprint != layout_of((8, 24)).fingerprint


@pytest.mark.parametrize(
    ("label", "block_ids", "first", "chunk_bytes", "expected"),
    [
        ("one read", [5, 6, 7], 0, 1000, [Read(0, 0, 3)]),
        ("chunks with a rest", [5, 6, 7], 0, 20, [Read(0, 0, 2), Read(0, 2, 1)]),
        ("a chunk smaller than a block", [5, 6], 0, 1, [Read(0, 0, 1), Read(0, 1, 1)]),
        ("local prefix", [5, 6, 7], 2, 1000, [Read(0, 2, 1)]),
        ("all is local", [5, 6, 7], 3, 1000, []),
        ("nothing", [], 0, 1000, []),
        ("null blocks outside the window", [0, 0, 7, 8], 0, 1000, [Read(0, 2, 2)]),
        ("a null block in the middle", [5, 0, 7], 0, 1000, [Read(0, 0, 1), Read(0, 2, 1)]),
        ("only null blocks", [0, 0], 0, 1000, []),
        ("prefix over null blocks", [0, 0, 7], 1, 1000, [Read(0, 2, 1)]),
    ],
)
def test_reads_of_one_group(
    label: str, block_ids: list[int], first: int, chunk_bytes: int, expected: list[Read]
) -> None:
    assert plan_reads(layout_of((10,)), [block_ids], [first], chunk_bytes) == expected, label


def test_groups_are_cut_by_their_own_block_bytes() -> None:
    reads = plan_reads(layout_of((10,), (40,)), [[1, 2], [3, 4]], [0, 0], 40)
    # In the order in which their last tokens are computed.
    assert reads == [Read(1, 0, 1), Read(0, 0, 2), Read(1, 1, 1)]


@given(
    block_ids=st.lists(st.integers(0, 3), max_size=40),
    first=st.integers(0, 45),
    chunk_bytes=st.integers(1, 200),
)
def test_reads_cover_exactly_the_blocks_that_are_missing(
    block_ids: list[int], first: int, chunk_bytes: int
) -> None:
    reads = plan_reads(layout_of((10, 6)), [block_ids], [first], chunk_bytes)
    positions = [
        p for read in reads for p in range(read.first_block, read.first_block + read.num_blocks)
    ]
    assert positions == [p for p, block in enumerate(block_ids) if block and p >= first]
    assert all(read.num_blocks == 1 or read.num_blocks * 16 <= chunk_bytes for read in reads)
