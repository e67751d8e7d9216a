"""Recorded traffic: a trace's arrivals and lengths, and prompts of exactly those lengths."""

import csv
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Protocol

from cluster.errors import ConfigError

_HERE = Path(__file__).parent
AZURE_CONVERSATIONS = _HERE / "loadtest" / "data" / "azure_conv_excerpt.csv"
HELD_OUT_TEXT = _HERE / "models" / "corpus" / "heldout.txt.xz"

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_TRIES = 200


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace: when it came after the first one, and how long it was."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Return the first `limit` requests; raise `ConfigError` with the line that is wrong."""
    try:
        with path.open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != _COLUMNS:
                raise ConfigError(f"{path}:1: columns {header}, expected {_COLUMNS}")
            parsed = [
                _parse(row, f"{path}:{number}")
                for number, row in enumerate(rows, start=2)
                if limit is None or number < limit + 2
            ]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return list(_from_first(parsed, path))


def _parse(row: Sequence[str], place: str) -> tuple[datetime, int, int]:
    try:
        stamp, prompt, output = row
        # Python reads at most six digits of a second's fraction, the trace has seven.
        arrival = datetime.fromisoformat(stamp[:26])
        lengths = int(prompt), int(output)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    if min(lengths) < 1:
        raise ConfigError(f"{place}: lengths must be at least 1, not {lengths}")
    return arrival, *lengths


def _from_first(rows: Sequence[tuple[datetime, int, int]], path: Path) -> Iterable[TraceRequest]:
    previous_s = 0.0
    for number, (arrival, prompt, output) in enumerate(rows, start=2):
        at_s = (arrival - rows[0][0]).total_seconds()
        if at_s < previous_s:
            raise ConfigError(f"{path}:{number}: arrives before the line above it")
        previous_s = at_s
        yield TraceRequest(at_s, prompt, output)


def fit_lengths(
    requests: Sequence[TraceRequest], context: int, max_output: int
) -> list[TraceRequest]:
    """Return the requests with all lengths scaled alike, so that the longest prompt fits the
    model's `context` beside `max_output` tokens and no output is longer than those."""
    if not requests:
        return []
    longest_prompt = max(request.prompt_tokens for request in requests)
    longest_output = max(request.output_tokens for request in requests)
    output_scale = min(1.0, max_output / longest_output)
    prompt_scale = min(1.0, (context - max_output) / longest_prompt)
    return [
        TraceRequest(
            request.at_s,
            max(1, int(request.prompt_tokens * prompt_scale)),
            max(1, int(request.output_tokens * output_scale)),
        )
        for request in requests
    ]


def read_text(path: Path = HELD_OUT_TEXT) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


class PromptSource:
    """Cuts prompts of exact token counts out of a text."""

    def __init__(self, tokenizer: Tokenizer, text: str, rng: Random) -> None:
        self._tokenizer = tokenizer
        self._token_ids = tokenizer.encode(text)
        self._rng = rng

    def prompt(self, num_tokens: int) -> str:
        """Return a text that the tokenizer turns into exactly `num_tokens` tokens.

        Text cut between two tokens may be tokenised otherwise at its ends, so places are tried
        until one comes out right.
        """
        last = max(0, len(self._token_ids) - num_tokens)
        for _ in range(_TRIES):
            start = self._rng.randint(0, last)
            text = self._tokenizer.decode(self._token_ids[start : start + num_tokens])
            surplus = len(self._tokenizer.encode(text)) - num_tokens
            if surplus > 0:
                # Special tokens that the tokenizer adds to every text.
                end = start + num_tokens - surplus
                text = self._tokenizer.decode(self._token_ids[start:end])
                surplus = len(self._tokenizer.encode(text)) - num_tokens
            if surplus == 0:
                return text
        raise ConfigError(f"no text of exactly {num_tokens} tokens found in {_TRIES} tries")


class FileTokenizer:
    """A model folder's or Hugging Face name's own tokenizer."""

    def __init__(self, model: str) -> None:
        import tokenizers

        path = Path(model) / "tokenizer.json"
        try:
            self._tokenizer = (
                tokenizers.Tokenizer.from_file(str(path))
                if Path(model).is_dir()
                else tokenizers.Tokenizer.from_pretrained(model)
            )
        except Exception as error:
            # The library raises bare `Exception`s.
            raise ConfigError(f"{path}: no tokenizer to build prompts with: {error}") from None

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text).ids
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids))
        return text
