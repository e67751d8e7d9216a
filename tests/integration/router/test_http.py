"""What a client gets, by the real `openai` SDK over a real server: answers and parameters."""

import json
from typing import Any

import pytest

from cluster.vllm_documents import sampling_from_document
from router.first_token import may_prefill_sample
from tests.integration.router.endpoint import ANSWER, MODEL, Endpoint
from tests.integration.router.fake_flow import DECODE_WORKER, PREFILL_WORKER, REUSED_TOKENS

# vLLM uses what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HELLO = [{"role": "user", "content": "What is wisdom?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}


def text_of(endpoint: Endpoint, num_tokens: int) -> str:
    return str(endpoint.tokenizer.decode(list(endpoint.flow.answer[:num_tokens])))


def test_models_are_listed(endpoint: Endpoint, client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat(endpoint: Endpoint, client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, temperature=0
    )
    (choice,) = answer.choices
    assert choice.message.content == text_of(endpoint, 5)
    assert choice.finish_reason == "length"
    (request,) = endpoint.flow.requests
    prompt = endpoint.tokenizer.decode(list(request.prompt_token_ids), skip_special_tokens=False)
    assert prompt.endswith("<|user|>What is wisdom?<|end|><|assistant|>")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens_details.cached_tokens == REUSED_TOKENS
    assert not request.local_only


def test_chat_stream_with_usage(endpoint: Endpoint, client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == text_of(endpoint, 8)
    assert sum(map(bool, deltas)) > 3, "tokens arrive one by one"
    assert chunks[-1].usage.completion_tokens == 8
    assert endpoint.flow.endings == ["finished"]


@pytest.mark.parametrize(
    ("parameters", "is_prefills"),
    [
        ({}, True),
        ({"temperature": 0, "presence_penalty": 0.0, "seed": None, "stop": ["x"]}, True),
        ({"temperature": 0.7, "top_p": 0.9, "logit_bias": {"300": 1}}, True),
        ({"seed": 0}, False),
        ({"logprobs": True}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"extra_body": {"repetition_penalty": 1.2}}, False),
        ({"extra_body": {"bad_words": ["king"]}}, False),
    ],
    ids=str,
)
def test_who_may_sample_the_first_token(
    endpoint: Endpoint, client: Any, parameters: dict[str, Any], is_prefills: bool
) -> None:
    """By what vLLM's front-end really makes of a request."""
    client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, **parameters)
    (request,) = endpoint.flow.requests
    assert may_prefill_sample(request.sampling) == is_prefills, request.sampling


def test_completion_of_several_prompts(endpoint: Endpoint, client: Any) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["In the beginning", "The king"], max_tokens=4
    )
    assert [choice.text for choice in answer.choices] == [text_of(endpoint, 4)] * 2
    assert len({request.request_id for request in endpoint.flow.requests}) == 2
    assert len({request.exchange_id for request in endpoint.flow.requests}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(endpoint: Endpoint, client: Any, stream: bool) -> None:
    texts = {0: "", 1: "", 2: ""}
    answer = client.completions.create(
        model=MODEL, prompt="In the", n=3, max_tokens=6, temperature=0.9, seed=5, stream=stream
    )
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == dict.fromkeys(range(3), text_of(endpoint, 6))
    seeds = [sampling_from_document(request.sampling).seed for request in endpoint.flow.requests]
    assert seeds == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_flow(endpoint: Endpoint, client: Any, stream: bool) -> None:
    stop = " pass in"
    answer = client.completions.create(
        model=MODEL, prompt="In the", stop=[stop], max_tokens=200, stream=stream
    )
    parts = [part.choices[0] for part in (answer if stream else [answer])]
    assert "".join(part.text for part in parts) == ANSWER[: ANSWER.index(stop)]
    assert parts[-1].finish_reason == "stop"
    endpoint.wait(lambda: endpoint.flow.endings == ["closed"])


def test_logprobs(endpoint: Endpoint, client: Any) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == text_of(endpoint, 3)
    assert [entry.logprob for entry in content] == [-0.5] * 3
    assert [len(entry.top_logprobs) for entry in content] == [2] * 3
    plain = client.completions.create(model=MODEL, prompt="In the", max_tokens=3, logprobs=1)
    assert plain.choices[0].logprobs.token_logprobs == [-0.5] * 3


def test_echo_with_logprobs_is_local(endpoint: Endpoint, client: Any) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="In the beginning", max_tokens=2, echo=True, logprobs=1
    )
    (request,) = endpoint.flow.requests
    assert request.local_only
    assert answer.choices[0].text == "In the beginning" + text_of(endpoint, 2)
    logprobs = answer.choices[0].logprobs.token_logprobs
    num_prompt_tokens = len(request.prompt_token_ids)
    assert logprobs == [None, *[-0.5] * (num_prompt_tokens - 1 + 2)]


def test_grammar_reaches_the_worker(endpoint: Endpoint, client: Any) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=4,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    )
    grammar = sampling_from_document(endpoint.flow.requests[0].sampling).structured_outputs
    assert grammar is not None
    assert (json.loads(grammar.json) if isinstance(grammar.json, str) else grammar.json) == SCHEMA
    assert grammar._backend == "xgrammar"


def test_named_tool_reaches_the_worker(endpoint: Endpoint, client: Any) -> None:
    tool = {"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=4,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "greet"}},
    )
    grammar = sampling_from_document(endpoint.flow.requests[0].sampling).structured_outputs
    assert grammar is not None
    assert grammar._backend == "xgrammar"


def test_sampling_parameters_reach_the_worker(endpoint: Endpoint, client: Any) -> None:
    client.completions.create(
        model=MODEL,
        prompt="In the",
        max_tokens=4,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        presence_penalty=0.25,
        logit_bias={"17": -2},
        extra_body={"min_tokens": 2, "top_k": 7, "bad_words": ["king"], "cache_salt": "mine"},
    )
    (request,) = endpoint.flow.requests
    sampling = sampling_from_document(request.sampling)
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 11)
    assert (sampling.min_tokens, sampling.top_k, sampling.presence_penalty) == (2, 7, 0.25)
    assert sampling.logit_bias == {17: -2}
    assert sampling.bad_words_token_ids
    assert sampling.eos_token_id == 1
    assert sampling.all_stop_token_ids == {1, 7}, "EOS, and the chat's end of generation_config"
    assert request.cache_salt == "mine"


def test_headers_name_request_and_workers(endpoint: Endpoint) -> None:
    body = {"model": MODEL, "prompt": "In the", "max_tokens": 2}
    for stream in (False, True):
        answer = endpoint.post(
            "/v1/completions",
            json={**body, "stream": stream},
            headers={"X-Request-Id": f"mine-{stream}"},
        )
        assert answer.headers["x-request-id"] == f"mine-{stream}"
        assert answer.headers["x-tandem-prefill-worker"] == PREFILL_WORKER
        assert answer.headers["x-tandem-decode-worker"] == DECODE_WORKER
        assert f"cmpl-mine-{stream}" in answer.text
        assert endpoint.flow.requests[-1].exchange_id == f"mine-{stream}"
    made = endpoint.post("/v1/completions", json=body)
    assert made.json()["id"].startswith(f"cmpl-{made.headers['x-request-id']}")


def test_other_surfaces_of_vllm(endpoint: Endpoint, client: Any) -> None:
    tokens = endpoint.post("/tokenize", json={"model": MODEL, "prompt": "In the"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    message = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
    answer = endpoint.post("/v1/messages", json=message)
    assert answer.json()["content"][0]["text"] == text_of(endpoint, 3)
    response = client.responses.create(model=MODEL, input="What is wisdom?", max_output_tokens=3)
    assert response.output_text == text_of(endpoint, 3)


def test_operator_routes(endpoint: Endpoint, client: Any) -> None:
    client.completions.create(model=MODEL, prompt="In", max_tokens=1)
    (exchange_id,) = endpoint.flow.records
    assert endpoint.get("/health").json() == {"healthy": True, "reason": "ok"}
    endpoint.health = (False, "no hand-off has moved a token")
    sick = endpoint.get("/health")
    assert (sick.status_code, sick.json()["reason"]) == (503, "no hand-off has moved a token")
    assert endpoint.get(f"/admin/requests/{exchange_id}").json() == {"id": exchange_id}
    assert endpoint.get("/admin/requests/unknown").status_code == 404
    assert endpoint.get("/admin/requests?limit=1").json() == {"requests": [{"id": exchange_id}]}
    assert endpoint.get("/admin/requests?limit=0").status_code == 400
    assert endpoint.get("/debug/pinned").json()["open_reservations"] == 0
    assert "tandem_requests_total" in endpoint.get("/metrics").text
