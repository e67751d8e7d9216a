"""Which requests' first token prefill may sample."""

import pytest

from router.first_token import may_prefill_sample

# As vLLM's front-end leaves them.
PLAIN: dict[str, object] = {
    "temperature": 0.0,
    "max_tokens": 5,
    "watermarking": False,
    "output_kind": 2,
    "skip_clone": True,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "skip_reading_prefix_cache": False,
    "_eos_token_id": 2,
    "_all_stop_token_ids": [2],
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
        {"min_tokens": 3, "ignore_eos": True},
        {"stop": ["a"], "stop_token_ids": [3], "include_stop_str_in_output": True},
        {"logit_bias": {"3": 1.0}, "allowed_token_ids": [3, 4]},
    ],
)
def test_prefill_samples_what_looks_at_the_model_alone(more: dict[str, object]) -> None:
    assert may_prefill_sample({**PLAIN, **more})


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 0},
        {"watermarking": True},
        {"logprobs": 0},
        {"logprob_token_ids": [3]},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": ["a"]},
        {"structured_outputs": "{}"},
        {"repetition_detection": {"max_pattern_size": 3}},
        {"thinking_token_budget": 5},
        {"extra_args": {"x": 1}},
        {"what_a_later_version_has": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_decode_samples_the_rest(more: dict[str, object]) -> None:
    assert not may_prefill_sample({**PLAIN, **more})
