"""Sampling parameters and log-probabilities survive the wire, derived fields included.

Not in the unit tier: importing vLLM takes seconds.
"""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from cluster.errors import RequestInvalid
from cluster.messages import CODEC, Decode, Tokens
from cluster.names import RequestId
from cluster.vllm_documents import (
    logprobs_document,
    logprobs_from_document,
    prompt_logprobs_document,
    prompt_logprobs_from_document,
    sampling_document,
    sampling_from_document,
)

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "greedy": {"temperature": 0.0},
    "greedy clears what only sampling reads": {"temperature": 0, "top_p": 0.5, "top_k": 3},
    "nearly greedy": {"temperature": 0.001},
    "random": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 2**63 - 1},
    "seed of -1 is none": {"seed": -1},
    "penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
    },
    "several": {"n": 3, "seed": 1},
    "stop string": {"stop": "halt"},
    "stop strings": {
        "stop": ["halt", "\u05e9\u05dc\u05d5\u05dd"],
        "include_stop_str_in_output": True,
    },
    "stop tokens": {"stop_token_ids": [5, 9, 5], "min_tokens": 3},
    "open end": {"max_tokens": None, "ignore_eos": True},
    "log-probabilities": {"logprobs": 5, "prompt_logprobs": 0, "flat_logprobs": True},
    "of chosen tokens": {"logprob_token_ids": [1, 2, 3], "prompt_logprob_start": 2},
    "logit bias": {"logit_bias": {0: -100.0, 4095: 3.5}},
    "allowed tokens": {"allowed_token_ids": [7, 8, 9]},
    "bad words": {"bad_words": ["king", "queen"]},
    "tokens only": {"detokenize": False, "skip_special_tokens": False},
    "text": {"spaces_between_special_tokens": False},
    "deltas": {"output_kind": RequestOutputKind.DELTA, "stream_interval": 4, "skip_clone": True},
    "final only": {"output_kind": RequestOutputKind.FINAL_ONLY},
    "extra arguments": {"extra_args": {"a": [1, 2.5, "x"], "b": {"c": None}}},
    "thinking": {"thinking_token_budget": 12},
    "no prefix cache": {"skip_reading_prefix_cache": True},
    "no watermark": {"watermarking": False},
    "repetition": {"repetition_detection": RepetitionDetectionParams(4, 1, 3)},
    "routed experts": {"routed_experts_prompt_start": 2},
    "replay": {"trace_decode_token_ids": [3, 4]},
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema": {"json": SCHEMA, "disable_any_whitespace": True},
    "schema as text": {"json": json.dumps(SCHEMA), "disable_additional_properties": True},
    "regex": {"regex": r"[a-z]+\u00e9"},
    "choice": {"choice": ["yes", "no"]},
    "grammar": {"grammar": 'root ::= "a" | "b"'},
    "any object": {"json_object": True, "whitespace_pattern": " ?"},
    "structural tag": {"structural_tag": json.dumps({"type": "structural_tag", "format": {}})},
}
# Set by vLLM's input processor; the engine core reads them and cannot derive them.
DERIVED = {
    "_eos_token_id": 1,
    "_all_stop_token_ids": {1, 5, 9},
    "_bad_words_token_ids": [[300, 301], [17]],
    "_watermarking_skipped": True,
}


def params_of(name: str) -> SamplingParams:
    if name in SETTINGS:
        return SamplingParams(**SETTINGS[name])
    grammar = StructuredOutputsParams(**GRAMMARS[name])
    grammar._backend, grammar._backend_was_auto = "xgrammar", True
    return SamplingParams(structured_outputs=grammar)


def sent(params: SamplingParams) -> SamplingParams:
    """Return what a worker reads of `params`, by way of a real frame."""
    request_id = RequestId("r")
    decode = Decode(request_id, (1, 2), sampling_document(params), None, None, 0)
    return sampling_from_document(CODEC.decode(CODEC.encode(decode)).sampling)


@pytest.mark.parametrize("is_processed", [False, True])
@pytest.mark.parametrize("name", [*SETTINGS, *GRAMMARS])
def test_parameters_arrive(name: str, is_processed: bool) -> None:
    params = params_of(name)
    if is_processed:
        for field, value in DERIVED.items():
            setattr(params, field, value)
    received = sent(params)
    for field in SamplingParams.__struct_fields__:
        assert getattr(received, field) == getattr(params, field), field
    assert received == params
    assert received.sampling_type == params.sampling_type
    assert sent(received) == params


def test_every_parameter_has_a_setting() -> None:
    """A field that a later vLLM adds must be thought about here."""
    fields = {field for settings in SETTINGS.values() for field in settings}
    derived = {*DERIVED, "output_text_buffer_length", "structured_outputs"}
    # The router refuses it: its answer has no place in the messages.
    refused = {"prompt_logprob_token_ids"}
    assert set(SamplingParams.__struct_fields__) == fields | derived | refused


def test_defaults_are_not_sent() -> None:
    document = sampling_document(SamplingParams(max_tokens=7, ignore_eos=True))
    assert (document["max_tokens"], document["ignore_eos"]) == (7, True)
    assert len(document) < 8
    # As a client's JSON has them: equal to vLLM's defaults, not the same objects.
    spelled_out = json.loads('{"presence_penalty": 0.0, "repetition_penalty": 1.0, "top_p": 1.0}')
    assert sampling_document(SamplingParams(**spelled_out)).keys() == document.keys() - {
        "max_tokens",
        "ignore_eos",
    }


def test_schema_may_be_deeper_than_a_document() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        schema = {"type": "object", "properties": {"x": schema}}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
    assert sent(params) == params


@pytest.mark.parametrize(
    "document",
    [
        {"max_tokens": "many"},
        {"max_tokens": -1},
        {"temperature": float("nan")},
        {"stop": [1]},
        {"structured_outputs": "{"},
        {"structured_outputs": "[" * 100_000},
        {"structured_outputs": "{}"},
        {"structured_outputs": '{"json": "{}", "regex": "x"}'},
        {"logit_bias": {"x": 1.0}},
        {"output_kind": 9},
    ],
)
def test_what_is_no_sampling_document_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(RequestInvalid, match="not a sampling document"):
        sampling_from_document(document)


def rows(num_rows: int, num_columns: int) -> tuple[list[list[int]], list[list[float]], list[int]]:
    generator = np.random.default_rng(num_rows)
    token_ids = generator.integers(0, 4096, (num_rows, num_columns)).tolist()
    logprobs = generator.normal(size=(num_rows, num_columns)).astype(np.float32)
    if num_rows:
        logprobs[0, -1] = -np.inf
    return token_ids, logprobs.tolist(), list(range(num_rows))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_logprobs_arrive_exactly(num_rows: int) -> None:
    token_ids, logprobs, ranks = rows(num_rows, 6)
    lists = LogprobsLists(
        np.array(token_ids, dtype=np.int32),
        np.array(logprobs, dtype=np.float32),
        np.array(ranks, dtype=np.int32),
    )
    message = Tokens(RequestId("r"), (1,), logprobs=logprobs_document(lists))
    received = logprobs_from_document(CODEC.decode(CODEC.encode(message)).logprobs)
    for one, other in zip(received[:3], lists[:3], strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.parametrize("num_rows", [0, 1, 40])
def test_prompt_logprobs_arrive_exactly(num_rows: int) -> None:
    token_ids, logprobs, ranks = rows(num_rows, 3)
    tensors = LogprobsTensors(
        torch.tensor(token_ids, dtype=torch.int32).reshape(num_rows, 3),
        torch.tensor(logprobs, dtype=torch.float32).reshape(num_rows, 3),
        torch.tensor(ranks, dtype=torch.int32),
    )
    message = Tokens(RequestId("r"), (), prompt_logprobs=prompt_logprobs_document(tensors))
    received = prompt_logprobs_from_document(CODEC.decode(CODEC.encode(message)).prompt_logprobs)
    for one, other in zip(received[:3], tensors[:3], strict=True):
        assert torch.equal(one.reshape(other.shape), other)
        assert one.dtype == other.dtype


def test_documents_hold_only_plain_values() -> None:
    params = params_of("logit bias")
    params._all_stop_token_ids = {1, 2}
    assert msgspec.json.decode(msgspec.json.encode(sampling_document(params)))
