"""Blocks in tensors, here on the CPU: the same bytes as arrays have, and checksums of them."""

import random

import numpy as np
import pytest
import torch

from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import host_bytes, host_checksum
from kv_transfer.faults import corrupt_block
from kv_transfer.layout import BlockLayout, GroupLayout, Read
from kv_transfer.tensor_blocks import TensorBlockStore

NUM_BLOCKS = 20
# Words of eight, four, two bytes and none, and one whose part of a chunk begins askew.
SIZES = (64, 12, 6, 5, 64)
LAYOUT = BlockLayout((GroupLayout(16, SIZES), GroupLayout(16, (64, 16))), {})
IDS = (3, 19, 0, 7, 4)


def stores(seed: int) -> tuple[TensorBlockStore, ArrayBlockStore]:
    """Return two stores over the same memory."""
    rng = np.random.default_rng(seed)
    arrays = [
        [rng.integers(0, 256, (NUM_BLOCKS, size), np.uint8) for size in group.region_bytes]
        for group in LAYOUT.groups
    ]
    tensors = [[torch.from_numpy(array) for array in group] for group in arrays]
    return TensorBlockStore(LAYOUT, tensors), ArrayBlockStore(LAYOUT, arrays)


def tensor(num_bytes: int, offset: int = 16) -> torch.Tensor:
    return torch.zeros(offset + num_bytes, dtype=torch.uint8)[offset:]


@pytest.mark.parametrize("group", [0, 1])
def test_chunks_are_those_of_arrays_wherever_they_go(group: int) -> None:
    store, arrays = stores(1)
    num_bytes = len(IDS) * LAYOUT.groups[group].block_bytes
    expected, host, device = bytearray(num_bytes), bytearray(num_bytes), tensor(num_bytes)
    arrays.gather(group, IDS, memoryview(expected))
    store.gather(group, IDS, memoryview(host))
    store.gather(group, IDS, device)
    assert host == expected == device.numpy().tobytes()
    for payload in (memoryview(bytes(expected)), device):
        target, seen = stores(2)
        target.scatter(group, IDS, payload)
        found = bytearray(num_bytes)
        seen.gather(group, IDS, memoryview(found))
        assert found == expected


def test_rows_that_do_not_follow_each_other() -> None:
    """As where a K/V pair stands before the blocks: rows of words, or at odd places."""
    pair = torch.arange(2 * NUM_BLOCKS * 16, dtype=torch.int32).to(torch.uint8)
    for step, start in ((32, 16), (16, 3)):
        rows = pair[start:].as_strided((NUM_BLOCKS, 16), (step, 1))
        layout = BlockLayout((GroupLayout(16, (16,)),), {})
        store, out = TensorBlockStore(layout, [[rows]]), tensor(3 * 16)
        store.gather(0, (2, 0, 5), out)
        assert out.view(3, 16).equal(rows[[2, 0, 5]])
        store.scatter(0, (4,), tensor(16))
        assert not rows[4].any() and rows[5].any()


def test_checksums_tell_what_differs_and_where() -> None:
    store, _ = stores(3)
    rng = random.Random(3)
    content = bytearray(rng.randbytes(1003))
    sums = {store.checksum(torch.frombuffer(content, dtype=torch.uint8))}
    assert sums == {store.checksum(torch.frombuffer(bytearray(content), dtype=torch.uint8))}
    for at in (0, 7, 500, 999, 1002):
        other = bytearray(content)
        other[at] ^= 0x80
        sums.add(store.checksum(torch.frombuffer(other, dtype=torch.uint8)))
    swapped = content[512:1000] + content[:512] + content[1000:]
    sums.add(store.checksum(torch.frombuffer(swapped, dtype=torch.uint8)))
    sums.add(store.checksum(torch.frombuffer(content[:1000], dtype=torch.uint8)))
    sums.add(store.checksum(torch.frombuffer(content + b"\0", dtype=torch.uint8)))
    assert len(sums) == 9 and all(0 <= one < 1 << 64 for one in sums)
    assert store.checksum(memoryview(content)) == host_checksum(memoryview(content))


def test_blocks_that_cancel_each_other_out_in_a_sum_do_not_here() -> None:
    """Numbers of bfloat16 in float32 leave the low halves empty; blocks are powers of two."""
    store, _ = stores(3)
    words = torch.zeros(1 << 16, dtype=torch.int64)
    words[: 1 << 15] = 1 << 48
    swapped = words.flip(0)
    sums = {store.checksum(one.view(torch.uint8)) for one in (words, swapped, ~words, -words)}
    assert len(sums) == 4


def test_damage_is_the_same_in_tensors() -> None:
    payload = random.Random(4).randbytes(3 * LAYOUT.groups[0].block_bytes)
    on_host = corrupt_block(LAYOUT, Read(0, 0, 3), memoryview(payload))
    original = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    in_tensor = corrupt_block(LAYOUT, Read(0, 0, 3), original)
    assert isinstance(in_tensor, torch.Tensor)
    assert bytes(host_bytes(on_host)) == in_tensor.numpy().tobytes() != payload
    assert original.numpy().tobytes() == payload


def test_arrays_take_no_tensors() -> None:
    _, arrays = stores(5)
    with pytest.raises(TypeError, match="blocks that are not tensors"):
        arrays.gather(0, IDS, tensor(8))
