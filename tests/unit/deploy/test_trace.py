"""Reading a trace, scaling it to a model, and cutting prompts of exact lengths."""

import itertools
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from deploy.trace import (
    AZURE_CONVERSATIONS,
    PromptSource,
    TraceRequest,
    fit_lengths,
    read_text,
    read_trace,
)

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_reads_the_bundled_excerpt() -> None:
    trace = read_trace(AZURE_CONVERSATIONS)
    assert len(trace) == 600
    assert trace[0] == TraceRequest(0.0, 374, 44)
    assert trace[1].at_s == pytest.approx(4.314579)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(trace))


def test_reads_only_what_is_asked_for() -> None:
    assert read_trace(AZURE_CONVERSATIONS, 3) == read_trace(AZURE_CONVERSATIONS)[:3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "trace.csv:1: columns []"),
        ("TIMESTAMP,Context\n", "trace.csv:1: columns"),
        (HEADER + "yesterday,1,1\n", "trace.csv:2: Invalid isoformat string"),
        (HEADER + "2023-11-16 18:15:46.6805900,1\n", "trace.csv:2: not enough values"),
        (HEADER + "2023-11-16 18:15:46.6805900,1,x\n", "trace.csv:2: invalid literal"),
        (HEADER + "2023-11-16 18:15:46.6805900,0,1\n", "trace.csv:2: lengths must be at least 1"),
        (
            HEADER + "2023-11-16 18:15:46.6805900,1,1\n2023-11-16 18:15:45.6805900,1,1\n",
            "trace.csv:3: arrives before",
        ),
    ],
)
def test_a_malformed_trace_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_trace(write(tmp_path, text))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_trace_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.csv: No such file"):
        read_trace(Path("/nowhere.csv"))


LENGTHS = st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 5_000)), max_size=20)


@given(LENGTHS, st.integers(64, 4096))
def test_fitted_lengths_fit(lengths: list[tuple[int, int]], context: int) -> None:
    max_output = context // 4
    trace = [TraceRequest(float(i), p, o) for i, (p, o) in enumerate(lengths)]
    fitted = fit_lengths(trace, context, max_output)
    assert [r.at_s for r in fitted] == [r.at_s for r in trace]
    assert all(1 <= r.output_tokens <= max_output for r in fitted)
    assert all(1 <= r.prompt_tokens <= context - max_output for r in fitted)


def test_lengths_that_fit_are_left_alone() -> None:
    trace = [TraceRequest(0.0, 100, 10)]
    assert fit_lengths(trace, 1000, 100) == trace


class WordTokenizer:
    """A token per word and one special token; joins two words when they start a text."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._ids = {word: i + 1 for i, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        return [0, *(self._ids[word] for word in text.split())]

    def decode(self, token_ids: object) -> str:
        assert isinstance(token_ids, list)
        return " ".join(self._words[i - 1] for i in token_ids if i)


@given(st.integers(1, 50), st.integers(0, 2**32))
def test_prompts_have_exactly_the_tokens_asked_for(num_tokens: int, seed: int) -> None:
    words = [f"w{i}" for i in range(200)]
    tokenizer = WordTokenizer(words)
    source = PromptSource(tokenizer, " ".join(words), Random(seed))
    assert len(tokenizer.encode(source.prompt(num_tokens))) == num_tokens


def test_the_bundled_text_is_there() -> None:
    assert len(read_text()) > 100_000
