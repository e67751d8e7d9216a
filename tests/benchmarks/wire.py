"""`make bench-wire`: what it costs in tokens to hand KV caches over with a byte per number.

A 1P1D deployment of the bundled model per way of travelling, one after the other, and the same
greedy requests to each; what comes as it is has monolithic vLLM's tokens, which the exactness
suite proves. Then how fast one thread packs and unpacks.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import BlockStore
from kv_transfer.layout import BlockLayout, GroupLayout
from kv_transfer.packed_blocks import PackedBlockStore, WireDtype
from tests.benchmarks.sections import table, write_section
from tests.prompts import prompt_of
from tests.served import Served, tandem

AS_IS = "as_is"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_PROMPTS, NUM_NEW_TOKENS = 24, 64
SHORTEST, LONGEST = 100, 1500
NUM_REPEATS = 7
_NUM_LAYERS, _NUMBERS, _NUM_BLOCKS, _CHUNK = 8, 128 * 512, 64, 8


@dataclass(frozen=True)
class Answers:
    """What one deployment said, and the KV bytes that decode received for it."""

    tokens: list[list[int]]
    received_bytes: int


def ask(served: Served, num_prompts: int) -> Answers:
    """Ask for a greedy answer to each prompt, one at a time; each must have been handed over."""
    step = (LONGEST - SHORTEST) // num_prompts
    tokens, received_bytes = [], 0
    for number in range(num_prompts):
        prompt = prompt_of(SHORTEST + number * step, seed=1000 + number)
        asked = {"max_tokens": NUM_NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
        answer = served.complete(prompt, **asked)
        tokens.append(answer["choices"][0]["token_ids"])
        (sequence,) = served.record(answer["headers"]["x-request-id"])["sequences"]
        assert sequence["prompt_tokens"]["recomputed"] == 0, sequence
        received_bytes += sequence["received_bytes"]
    return Answers(tokens, received_bytes)


def run(dtype: str, wire_dtype: str, num_prompts: int) -> Answers:
    with tandem(
        "bench-wire",
        model__dtype=dtype,
        model__kv_cache_gib=0.25,
        model__max_model_len=2048,
        handoff__wire_dtype=wire_dtype,
        router__recovery="none",
    ) as served:
        return ask(served, num_prompts)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens two answers share from the start."""
    pairs = zip(ours, theirs, strict=True)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(ours))


def line(dtype: str, wire_dtype: str, answers: Answers, plain: Answers) -> list[str]:
    shared = list(map(first_difference, answers.tokens, plain.tokens))
    num_same = sum(number == NUM_NEW_TOKENS for number in shared)
    num_alike = sum(
        one == other
        for ours, theirs in zip(answers.tokens, plain.tokens, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )
    num_tokens = NUM_NEW_TOKENS * len(shared)
    num_different = len(shared) - num_same
    # A choice was made for each shared token and for the one that differs.
    per_token = num_different / (sum(shared) + num_different)
    return [
        dtype,
        wire_dtype,
        f"{answers.received_bytes / plain.received_bytes:.3f}",
        f"{num_alike / num_tokens:.1%}",
        f"{num_same} of {len(shared)}",
        f"{per_token:.2%}",
    ]


def rates(dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return the GB/s of KV cache, as the engine has it, that one thread gathers and scatters."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    shape = (_NUM_LAYERS, _NUM_BLOCKS, _NUMBERS)
    numbers = torch.randn(shape, generator=generator).to(dtype)
    rows = [layer.view(torch.uint8).numpy() for layer in numbers]
    layout = BlockLayout((GroupLayout(128, tuple(row.shape[1] for row in rows)),), {})
    plain = ArrayBlockStore(layout, [rows])
    stores: dict[str, BlockStore] = {AS_IS: plain}
    for wire_dtype in get_args(WireDtype):
        stores[wire_dtype] = PackedBlockStore(plain, [[dtype] * _NUM_LAYERS], wire_dtype)
    num_bytes = _CHUNK * layout.groups[0].block_bytes
    found = {}
    for name, store in stores.items():
        payload = memoryview(bytearray(_CHUNK * store.layout.groups[0].block_bytes))
        ids = range(1, 1 + _CHUNK)
        gathering = _median_s(functools.partial(store.gather, 0, ids, payload))
        scattering = _median_s(functools.partial(store.scatter, 0, ids, payload))
        found[name] = num_bytes / gathering / 1e9, num_bytes / scattering / 1e9
    return found


def _median_s(action: Callable[[], None]) -> float:
    taken = []
    for _ in range(1 + NUM_REPEATS):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def report(rows: list[list[str]], num_prompts: int) -> None:
    header = [
        "KV dtype",
        "`handoff.wire_dtype`",
        "bytes",
        "tokens the same",
        "whole answers the same",
        "chance that a token is another",
    ]
    speeds = [
        [name, wire, f"{gather:.2f}", f"{scatter:.2f}"]
        for name, dtype in DTYPES.items()
        for wire, (gather, scatter) in rates(dtype).items()
    ]
    body = (
        table(header, rows)
        + f"\n\n{num_prompts} prompts of {SHORTEST} to {LONGEST} held-out tokens, {NUM_NEW_TOKENS}"
        " greedy tokens each, one at a time, the bundled model, against the same requests with"
        f" `{AS_IS}`. After its first other token an answer goes its own way: *tokens the same*"
        " counts those that agree by position for all that, the last column the first differences"
        " per token up to there. GB/s of KV cache as the engine has it, one thread, chunks of"
        f" {_CHUNK} blocks:\n\n"
        + table(["KV dtype", "`handoff.wire_dtype`", "gather GB/s", "scatter GB/s"], speeds)
    )
    write_section("wire", "make bench-wire", body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS)
    num_prompts = parser.parse_args().prompts
    assert len(os.sched_getaffinity(0)) >= 2, "needs two cores: one per engine"
    rows = []
    for dtype in DTYPES:
        plain = run(dtype, AS_IS, num_prompts)
        for wire_dtype in get_args(WireDtype):
            rows.append(line(dtype, wire_dtype, run(dtype, wire_dtype, num_prompts), plain))
            print(*rows[-1], sep=" | ", flush=True)
    report(rows, num_prompts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
