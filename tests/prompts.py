"""Prompts of exact token counts, cut from text the bundled model was not trained on."""

import functools
import lzma
import random

from tokenizers import Tokenizer

from cluster.config import BUNDLED_MODEL

HELDOUT = BUNDLED_MODEL.parent / "corpus" / "heldout.txt.xz"


@functools.cache
def heldout_tokens() -> tuple[int, ...]:
    """Return the held-out text as token ids of the bundled model."""
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    with lzma.open(HELDOUT, "rt", encoding="utf-8") as file:
        return tuple(tokenizer.encode(file.read(), add_special_tokens=False).ids)


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Return `num_tokens` consecutive tokens from a place that `seed` chooses."""
    tokens = heldout_tokens()
    start = random.Random(seed).randrange(len(tokens) - num_tokens)
    return list(tokens[start : start + num_tokens])


def text_of(num_tokens: int, seed: int) -> str:
    """Return about `num_tokens` tokens of text."""
    tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    text: str = tokenizer.decode(prompt_of(num_tokens, seed))
    return text
