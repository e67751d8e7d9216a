"""From a spec's text to requests: kinds, scaling, phases, sessions, prompts."""

import itertools
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from deploy.loadtest.lengths import parse_length
from deploy.loadtest.planned import Part, Planned, fit, scale_lengths, scale_rate
from deploy.loadtest.prompts import PromptSource, text_of
from deploy.loadtest.words import WorkloadSpec
from deploy.loadtest.workload import plan, usage

CONTEXT = 2048
MOONCAKE = '{{"timestamp": 0, "input_length": {}, "output_length": 9, "hash_ids": {}}}\n'


def planned(text: str, seed: int = 0, **asked: float) -> list[Planned]:
    return plan(WorkloadSpec(text, **asked), CONTEXT, Random(seed))  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_requests() -> None:
    spec = "gamma:rate=5,input=64~0.5,prefix=8"
    assert planned(spec) == planned(spec)
    assert planned("poisson") != planned("poisson", seed=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("poison:rate=1", "no kind 'poison', did you mean 'poisson'?; there are azure, mooncake"),
        ("poisson:rat=1", "no key 'rat', did you mean 'rate'?; poisson takes name, duration"),
        ("poisson:rate=0", "rate=0 is not a number above 0"),
        ("poisson:rate", "rate needs one value"),
        ("poisson:rate=1,rate=2", "rate needs one value"),
        ("poisson:input=9..3", "input=9..3 is not a number of tokens such as 512"),
        ("heteroscale:curve=moon", "curve=moon is not one of dialogue, search"),
        ("azure;", "a phase is empty"),
        ("poisson:rate=0.001,duration=1", "no requests; raise its duration or its rate"),
        ("azure:path=/nowhere", "/nowhere: No such file"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_kind_is_explained() -> None:
    text = usage()
    for kind in ("azure", "mooncake", "burstgpt", "servegen", "poisson", "conversations"):
        assert f"\n{kind}: " in text


def test_time_scale_moves_times_and_rate_scale_numbers() -> None:
    whole = planned("azure")
    fast = planned("azure", time_scale=2.0)
    assert [r.at_s for r in fast] == [r.at_s / 2 for r in whole]
    assert len(planned("azure", rate_scale=0.25)) == pytest.approx(150, abs=30)
    doubled = planned("azure", rate_scale=2.5)
    assert len(doubled) == pytest.approx(1500, abs=45)
    assert max(r.at_s for r in doubled) <= whole[-1].at_s
    assert len(planned("azure:rate=2")) == pytest.approx(2 * whole[-1].at_s, rel=0.15)


def test_copies_have_content_of_their_own_and_keep_what_they_share() -> None:
    trace = [Planned(float(i), (Part("system", 8), Part(f"own {i}", 8)), 4) for i in range(4)]
    layers = scale_rate(trace, 2.0, Random(0))
    keys = [request.parts[0].key for request in layers]
    assert sorted(keys) == ["copy 1/system"] * 4 + ["system"] * 4


def test_duration_count_and_phases_bound_what_is_sent() -> None:
    assert len(planned("azure", num_requests=7)) == 7
    assert planned("poisson:rate=50", duration_s=2.0, time_scale=3.0)[-1].at_s < 2.0
    steps = planned("poisson:rate=9,duration=4,warmup=1;poisson:rate=30,duration=4,name=peak")
    names = [name for name, _ in itertools.groupby(steps, key=lambda r: r.phase)]
    assert names == ["1 poisson, warm-up", "1 poisson, main", "peak"]
    bursts = planned("bursts:rate=20,calm=5,on=2,off=2,duration=6")
    names = [name for name, _ in itertools.groupby(bursts, key=lambda r: r.phase)]
    assert names == ["burst 1", "calm 1", "burst 2"]
    assert {request.phase for request in planned("poisson")} == {""}


def test_long_requests_are_left_out_or_scaled() -> None:
    kept = planned("azure:longest=1000", length_scale=1.0)
    assert max(request.total_tokens for request in kept) <= 1000
    short = planned("azure:max_output=100")
    assert max(request.output_tokens for request in short) <= 100
    assert max(request.total_tokens for request in short) <= CONTEXT
    with pytest.raises(ConfigError, match=r"of 600 requests, the longest with \d+ tokens, exceed"):
        planned("azure", length_scale=1.0)


LENGTHS = st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 5_000)), max_size=9)


@settings(max_examples=25)
@given(LENGTHS, st.integers(64, 4096))
def test_fitted_lengths_fit(lengths: list[tuple[int, int]], context: int) -> None:
    trace = [Planned(i, (Part(str(i), p),), o) for i, (p, o) in enumerate(lengths)]
    fitted = fit(trace, context, None)
    assert [r.at_s for r in fitted] == [r.at_s for r in trace]
    assert all(min(r.prompt_tokens, r.output_tokens) >= 1 for r in fitted)
    assert all(r.total_tokens <= context for r in fitted)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=6), st.floats(0.001, 1.5))
def test_scaling_keeps_what_is_shared(sizes: list[int], factor: float) -> None:
    """The prompt's scaled beginning is the beginning of every longer prompt's, to the token."""
    parts = tuple(Part(f"b{i}", size) for i, size in enumerate(sizes))
    whole = scale_lengths([Planned(0.0, (*parts, Part("end", 5000)), 1)], factor, 1.0)[0]
    part = scale_lengths([Planned(0.0, parts, 1)], factor, 1.0)[0]
    if sum(sizes) * factor >= 1:
        assert whole.parts[: len(part.parts)] == part.parts
        assert part.prompt_tokens == int(sum(sizes) * factor + 1e-9)


def test_mooncake_keeps_its_prefixes_when_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE.format(10_000, list(range(20))))
    with path.open("a") as file:
        file.write(MOONCAKE.format(6_000, [*range(10), *range(50, 52)]))
    long, short = planned(f"mooncake:path={path}", length_scale=0.1)
    shared = [a for a, b in zip(long.parts, short.parts, strict=False) if a == b]
    assert sum(part.num_tokens for part in shared) == int(10 * 512 * 0.1)


def test_a_conversation_grows_and_waits_for_its_answers() -> None:
    turns = planned(
        "conversations:sessions=6,turns=3,system=20,groups=2,user=5..9,output=7,think=1"
    )
    assert len(turns) == 18
    assert len({turn.parts[0].key for turn in turns}) == 2
    by_session: dict[str | None, list[Planned]] = {}
    for turn in turns:
        by_session.setdefault(turn.session, []).append(turn)
    for first, second, third in by_session.values():
        assert [first.turn, second.turn, third.turn] == [0, 1, 2]
        assert second.parts[: len(first.parts)] == first.parts
        assert second.parts[len(first.parts)].num_tokens == 7
        assert first.think_s == 0.0
        assert third.at_s == pytest.approx(second.at_s + third.think_s)


def test_lengths_are_drawn_with_their_mean_and_spread() -> None:
    rng = Random(0)
    drawn = [parse_length("200~0.5").draw(rng) for _ in range(4000)]
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(200, rel=0.04)
    cv = (sum((value - mean) ** 2 for value in drawn) / len(drawn)) ** 0.5 / mean
    assert cv == pytest.approx(0.5, rel=0.1)
    assert {parse_length("3..5").draw(rng) for _ in range(60)} == {3, 4, 5}


class SyllableTokenizer:
    """Words of one to three tokens; a word's first token holds the space before it."""

    def __init__(self) -> None:
        self._pieces = [f" {a}{b}" for a in "bcdfg" for b in "aeiou"] + ["la", "mo"]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            size = 3 if text[0] == " " else 2
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids

    def decode(self, token_ids: object) -> str:
        assert isinstance(token_ids, list | tuple)
        return "".join(self._pieces[i] for i in token_ids)


def source(seed: int = 0) -> PromptSource:
    rng, tokenizer = Random(1), SyllableTokenizer()
    words = (
        tokenizer.decode([rng.randrange(25), *(rng.choices((25, 26), k=rng.randrange(3)))])
        for _ in range(60)
    )
    return PromptSource(tokenizer, "".join(words), seed)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 2**32))
def test_prompts_have_exact_lengths_and_are_the_same_tokens_as_text(
    sizes: list[int], seed: int
) -> None:
    parts = [Part(str(index), size) for index, size in enumerate(sizes)]
    prompt = source(seed).prompt_of(parts)
    assert len(prompt) == sum(sizes)
    tokenizer = SyllableTokenizer()
    assert tokenizer.encode(text_of(tokenizer, prompt)) == list(prompt)


def test_equal_parts_are_equal_tokens_and_others_differ_at_once() -> None:
    prompts = source()
    first = prompts.prompt_of([Part("system", 40), Part("a", 20)])
    second = prompts.prompt_of([Part("system", 40), Part("b", 20)])
    assert first[:40] == second[:40]
    assert first[40:48] != second[40:48]
    assert len({prompts.prompt(16)[:8] for _ in range(200)}) == 200


def test_a_tokenizer_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="has a single token for 0 words"):
        PromptSource(SyllableTokenizer(), "", 0)
