"""Promise 1: what the disaggregated path answers is what monolithic vLLM answers.

Negative control: wrong KV bytes do change answers, and checksums keep them out.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import BLOCK_SIZE, CHUNK_TOKENS, disaggregation
from tests.prompts import prompt_of, text_of
from tests.served import Served

pytestmark = pytest.mark.timeout(1200)

NUM_PROMPTS = 64
NUM_NEW_TOKENS = 64
MAX_PROMPT = 1900
LOGPROB_TOLERANCE = 1e-4


def prompt_lengths() -> list[int]:
    """Return 64 lengths: the ends, every length around block and chunk edges, others at random."""
    edges = [BLOCK_SIZE, CHUNK_TOKENS, 3 * BLOCK_SIZE, 2 * CHUNK_TOKENS, 4 * CHUNK_TOKENS, 1536]
    around = {edge + delta for edge in edges for delta in (-2, -1, 0, 1, 2)}
    lengths = sorted({1, 2, 3, 17, MAX_PROMPT - 1, MAX_PROMPT} | around)
    rng = random.Random(1)
    return lengths + [rng.randint(1, MAX_PROMPT) for _ in range(NUM_PROMPTS - len(lengths))]


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate(prompt_lengths())]
GREEDY: dict[str, Any] = {"max_tokens": NUM_NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(monolithic: Served) -> list[list[int]]:
    return [monolithic.tokens(prompt, **GREEDY) for prompt in PROMPTS]


def test_greedy_tokens_are_identical_one_by_one(
    disaggregated: Served, expected: list[list[int]]
) -> None:
    for number, prompt in enumerate(PROMPTS):
        answer = disaggregated.complete(prompt, return_token_ids=True, **GREEDY)
        got = answer["choices"][0]["token_ids"]
        assert got == expected[number], f"prompt {number} of {len(prompt)} tokens"


def test_greedy_tokens_are_identical_16_at_a_time(
    disaggregated: Served, expected: list[list[int]]
) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: disaggregated.tokens(prompt, **GREEDY), PROMPTS))
    wrong = [len(PROMPTS[i]) for i, got in enumerate(answers) if got != expected[i]]
    assert not wrong, f"prompt lengths that differ: {wrong}"


def test_greedy_tokens_are_identical_with_cached_prefixes_on_both_sides(
    disaggregated: Served, monolithic: Served
) -> None:
    """Both engines know a part of the prompt, then all of it but the last block."""
    whole = prompt_of(1300, seed=77)
    reused = []
    for length in (600, 1300, 1300, 1290):
        prompt = whole[:length]
        answer = disaggregated.complete(prompt, return_token_ids=True, **GREEDY)
        assert answer["choices"][0]["token_ids"] == monolithic.tokens(prompt, **GREEDY), length
        (sequence,) = disaggregated.record(answer["headers"]["x-request-id"])["sequences"]
        tokens = sequence["prompt_tokens"]
        assert tokens["transferred"] + tokens["reused"] == length and tokens["transferred"] > 0
        reused.append(tokens["reused"])
    assert reused == [0, 4 * BLOCK_SIZE, 10 * BLOCK_SIZE, 10 * BLOCK_SIZE]


def test_greedy_tokens_are_identical_over_tcp_and_out_of_smaller_blocks(
    expected: list[list[int]],
) -> None:
    """The others here go through shared memory, as two engines of one host do, in blocks of one
    size on both sides."""
    small = {"block_size": BLOCK_SIZE // 4}
    check_some_over("tcp", expected, prefill__engine_args=small)


def test_greedy_tokens_are_identical_over_channels(expected: list[list[int]]) -> None:
    """As GPUs' blocks go over `nccl`: out of tensors, sent in the order of what announces them."""
    check_some_over("gloo", expected)


def check_some_over(transport: str, expected: list[list[int]], **flags: Any) -> None:
    """Compare a sixth of the prompts over nothing but `transport`, one that both engines have in
    their caches by then too."""
    flags["handoff__transports"] = transport
    numbers = [*range(0, NUM_PROMPTS, 6)]
    numbers.append(numbers[-1])
    with disaggregation(f"test-e2e-{transport}", **flags) as served:
        for number in numbers:
            prompt = PROMPTS[number]
            answer = served.complete(prompt, return_token_ids=True, **GREEDY)
            assert answer["choices"][0]["token_ids"] == expected[number], len(prompt)
            (sequence,) = served.record(answer["headers"]["x-request-id"])["sequences"]
            assert sequence["transport"] in (transport, None), sequence
            assert sequence["prompt_tokens"]["recomputed"] <= 1, sequence
        assert sequence["prompt_tokens"]["reused"] > 0 < sequence["received_bytes"], sequence


def test_greedy_tokens_are_identical_where_decode_samples_the_first(
    disaggregated: Served, expected: list[list[int]]
) -> None:
    """A seed means nothing to greedy sampling, and leaves all of it to decode."""
    for number in range(0, NUM_PROMPTS, 6):
        prompt = PROMPTS[number]
        assert disaggregated.tokens(prompt, seed=1, **GREEDY) == expected[number], len(prompt)


def test_the_first_token_comes_from_prefill(disaggregated: Served) -> None:
    answer = disaggregated.complete(prompt_of(600, seed=11), **GREEDY)
    (sequence,) = disaggregated.record(answer["headers"]["x-request-id"])["sequences"]
    events = [stamp["event"] for stamp in sequence["events"]]
    assert events == ["arrived", "placed", "prefilled", "first_token", "decoding", "finished"]
    tokens = sequence["prompt_tokens"]
    assert tokens["transferred"] + tokens["reused"] == 600 and tokens["recomputed"] == 0
    assert answer["usage"]["prompt_tokens"] == 600
    assert answer["usage"]["completion_tokens"] == NUM_NEW_TOKENS


def test_a_first_token_that_ends_the_request_is_the_same(
    disaggregated: Served, monolithic: Served
) -> None:
    prompt = prompt_of(500, seed=12)
    first, second = monolithic.tokens(prompt, max_tokens=2, ignore_eos=True)
    texts = [
        monolithic.complete(prompt, max_tokens=num, ignore_eos=True)["choices"][0]["text"]
        for num in (1, 2)
    ]
    endings: list[tuple[dict[str, Any], bool]] = [
        ({"max_tokens": 1}, False),
        ({"stop_token_ids": [first]}, False),
        ({"stop": [texts[0]]}, False),
        ({"stop_token_ids": [second]}, True),
        # Across the first two tokens.
        ({"stop": [texts[1][len(texts[0]) - 1 :]]}, True),
        ({"stop_token_ids": [first], "min_tokens": 2}, True),
    ]
    for parameters, is_handed_over in endings:
        body = {"max_tokens": 8, "ignore_eos": True, **parameters}
        got, wanted = disaggregated.complete(prompt, **body), monolithic.complete(prompt, **body)
        for key in ("text", "finish_reason", "stop_reason"):
            assert got["choices"][0][key] == wanted["choices"][0][key], parameters
        for key in ("prompt_tokens", "completion_tokens"):
            assert got["usage"][key] == wanted["usage"][key], parameters
        (sequence,) = disaggregated.record(got["headers"]["x-request-id"])["sequences"]
        assert (sequence["prompt_tokens"] is not None) == is_handed_over, parameters


def test_decode_computes_at_most_one_prompt_token(disaggregated: Served) -> None:
    lengths = (2, 130, 700, 1500)
    # Sampled by prefill, and by decode.
    asked = [(length, more) for length in lengths for more in ({}, {"logprobs": 1})]
    for length, more in asked:
        prompt = prompt_of(length, 1000 + length + len(more))
        answer = disaggregated.complete(prompt, max_tokens=4, **more)
        (sequence,) = disaggregated.record(answer["headers"]["x-request-id"])["sequences"]
        tokens = sequence["prompt_tokens"]
        assert tokens["recomputed"] <= 1, sequence
        assert tokens["transferred"] + tokens["reused"] + tokens["recomputed"] == len(prompt)
        assert sequence["bytes_agree"] is True
        assert sequence["received_bytes"] > 0
        assert set(sequence["transport"].split("+")) <= {"cma", "shm"}
        assert answer["headers"]["x-tandem-prefill-worker"] == sequence["prefill_worker"]
        assert answer["headers"]["x-tandem-decode-worker"] == sequence["decode_worker"]


def test_logprobs_agree(disaggregated: Served, monolithic: Served) -> None:
    for length in (5, 127, 300, 1200):
        prompt = prompt_of(length, 2000 + length)
        parameters = {"max_tokens": 16, "logprobs": 5, "ignore_eos": True}
        got = disaggregated.complete(prompt, **parameters)["choices"][0]["logprobs"]
        wanted = monolithic.complete(prompt, **parameters)["choices"][0]["logprobs"]
        assert got["tokens"] == wanted["tokens"]
        pairs = zip(got["token_logprobs"], wanted["token_logprobs"], strict=True)
        assert max(abs(ours - theirs) for ours, theirs in pairs) < LOGPROB_TOLERANCE
        for ours, theirs in zip(got["top_logprobs"], wanted["top_logprobs"], strict=True):
            assert set(ours) == set(theirs)


@pytest.mark.parametrize(
    "parameters",
    [
        {"stop": [" the "], "max_tokens": 64},
        {"stop": ["and", "LORD"], "max_tokens": 64, "include_stop_str_in_output": True},
        {"n": 2, "temperature": 0.8, "seed": 7, "max_tokens": 24},
        {"min_tokens": 20, "max_tokens": 40, "stop": [","]},
        {"temperature": 1.0, "seed": 1234, "max_tokens": 40},
        {"temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 40, "max_tokens": 40},
        {"repetition_penalty": 1.3, "max_tokens": 40},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 40},
        {"logit_bias": {"300": 100.0}, "max_tokens": 3},
        {"echo": True, "logprobs": 1, "max_tokens": 4},
        {"max_tokens": 1},
    ],
    ids=lambda parameters: "+".join(parameters),
)
def test_sampling_parameters_mean_the_same(
    disaggregated: Served, monolithic: Served, parameters: dict[str, Any]
) -> None:
    prompt = text_of(300, seed=31)
    got = disaggregated.complete(prompt, **parameters)
    wanted = monolithic.complete(prompt, **parameters)
    for ours, theirs in zip(got["choices"], wanted["choices"], strict=True):
        assert ours["text"] == theirs["text"]
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert ours["stop_reason"] == theirs["stop_reason"]
    assert got["usage"]["completion_tokens"] == wanted["usage"]["completion_tokens"]
    assert got["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def chat(served: Served, **parameters: Any) -> dict[str, Any]:
    body = {
        "model": served.model,
        "messages": [{"role": "user", "content": text_of(160, seed=5)}],
        "temperature": 0.0,
        "max_tokens": 96,
        **parameters,
    }
    response = served.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_json_schema_output_is_the_same(disaggregated: Served, monolithic: Served) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    got = chat(disaggregated, response_format=response_format)
    wanted = chat(monolithic, response_format=response_format)
    assert got["message"]["content"] == wanted["message"]["content"]
    assert got["finish_reason"] == wanted["finish_reason"]


def test_a_named_tool_is_called_the_same(disaggregated: Served, monolithic: Served) -> None:
    tool = {"type": "function", "function": {"name": "remember", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "remember"}}
    got = chat(disaggregated, tools=[tool], tool_choice=choice)
    wanted = chat(monolithic, tools=[tool], tool_choice=choice)
    (ours,), (theirs,) = got["message"]["tool_calls"], wanted["message"]["tool_calls"]
    assert ours["function"] == theirs["function"]
    assert ours["function"]["name"] == "remember"


def test_a_seeded_prompt_over_several_chunks_is_sampled_the_same(
    disaggregated: Served, monolithic: Served
) -> None:
    """`echo` forces the whole prompt through decode in several steps, seeded draws included."""
    parameters = {"echo": True, "logprobs": 0, "seed": 3, "temperature": 1.0, "max_tokens": 12}
    prompt = text_of(3 * CHUNK_TOKENS, seed=77)
    got = disaggregated.complete(prompt, **parameters)["choices"][0]
    wanted = monolithic.complete(prompt, **parameters)["choices"][0]
    assert got["text"] == wanted["text"]


TO_DAMAGE = [number for number, prompt in enumerate(PROMPTS) if len(prompt) in (258, 1026, 1538)]
DAMAGED: dict[str, Any] = {
    "router__recovery": "elsewhere",
    "handoff__fault": "corrupt_received_block",
    # What is read in place has no way on which it could be damaged.
    "handoff__transports": "shm,tcp",
    # Or no worker would ever be listed: the warm-up hand-off is damaged too.
    "cluster__warmup": False,
}


def test_damaged_blocks_are_refused_and_the_answer_is_right(expected: list[list[int]]) -> None:
    with disaggregation("test-checked", **DAMAGED) as checked:
        for number in TO_DAMAGE:
            answer = checked.complete(PROMPTS[number], return_token_ids=True, **GREEDY)
            assert answer["choices"][0]["token_ids"] == expected[number]
            (sequence,) = checked.record(answer["headers"]["x-request-id"])["sequences"]
            causes = [attempt["cause"] for attempt in sequence["attempts"]]
            assert causes == ["handoff_failed", "handoff_failed", None]
            assert "checksum mismatch" in sequence["attempts"][0]["detail"]
            assert sequence["attempts"][-1]["prefill_worker"] is None


def test_without_checksums_damaged_blocks_change_the_answer(expected: list[list[int]]) -> None:
    with disaggregation("test-unchecked", handoff__checksum=False, **DAMAGED) as unchecked:
        answers = [unchecked.tokens(PROMPTS[number], **GREEDY) for number in TO_DAMAGE]
        (sequence,) = unchecked.client.get("/admin/requests?limit=1").json()["requests"]
        assert sequence["attempts"][-1]["cause"] is None
    assert answers != [expected[number] for number in TO_DAMAGE]
