"""The `openai` SDK against a real deployment, and what bad input gets."""

import statistics
import time
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.prompts import text_of
from tests.served import Served

pytestmark = pytest.mark.alone

BAD_INPUT_P95_S = 0.1
LARGE_BODY_BYTES = 50_000_000
MAX_GROWTH_BYTES = 10_000_000


@pytest.fixture
def sdk(disaggregated: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{disaggregated.url}/v1", api_key="none", max_retries=0)


def test_models(sdk: openai.OpenAI, disaggregated: Served) -> None:
    assert [model.id for model in sdk.models.list()] == [disaggregated.model]


def test_completion_and_chat(sdk: openai.OpenAI, disaggregated: Served) -> None:
    answer = sdk.completions.create(
        model=disaggregated.model, prompt=text_of(50, 1), max_tokens=12, temperature=0
    )
    assert answer.usage and answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    told = sdk.chat.completions.create(
        model=disaggregated.model,
        messages=[{"role": "user", "content": text_of(30, 2)}],
        max_tokens=12,
    )
    assert told.choices[0].message.content


def test_streaming_with_usage_gives_the_same_text(
    sdk: openai.OpenAI, disaggregated: Served
) -> None:
    parameters: dict[str, Any] = {
        "model": disaggregated.model,
        "messages": [{"role": "user", "content": text_of(200, 3)}],
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = sdk.chat.completions.create(**parameters)
    stream = sdk.chat.completions.create(
        **parameters, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"max_tokens": -1}, openai.BadRequestError),
        ({"temperature": "warm"}, openai.BadRequestError),
        ({"prompt": [1] * 5000}, openai.BadRequestError),
        ({"n": 0}, openai.BadRequestError),
    ],
    ids=lambda value: str(value)[:24],
)
def test_errors_are_openai_errors(
    sdk: openai.OpenAI, disaggregated: Served, change: dict[str, Any], status: type[Exception]
) -> None:
    request = {"model": disaggregated.model, "prompt": "x", "max_tokens": 4, **change}
    with pytest.raises(status) as caught:
        sdk.completions.create(**request)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.body and "message" in caught.value.body  # type: ignore[operator]


def test_bad_input_is_answered_fast(disaggregated: Served) -> None:
    model = disaggregated.model
    bodies: list[bytes] = [
        b"{not json",
        b"[]",
        b'{"model": "nobody", "prompt": "x"}',
        b'{"model": "%s", "prompt": "x", "max_tokens": -5}' % model.encode(),
        b'{"model": "%s", "prompt": {"a": 1}}' % model.encode(),
        b'{"model": "%s", "prompt": "%s"}' % (model.encode(), b"word " * 6000),
    ]
    times = []
    for body in bodies * 10:
        began = time.perf_counter()
        response = disaggregated.client.post("/v1/completions", content=body)
        times.append(time.perf_counter() - began)
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["message"]
    assert statistics.quantiles(times, n=20)[-1] < BAD_INPUT_P95_S, sorted(times)[-5:]


def front_end_bytes(served: Served) -> int:
    """Return the resident bytes of the router replica and its proxy."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    named = [p for p in family if any(n in " ".join(p.cmdline()) for n in ("Replica", "haproxy"))]
    assert named, "no router replica among the deployment's processes"
    return int(sum(process.memory_info().rss for process in named))


def slow_upload() -> Any:
    for _ in range(LARGE_BODY_BYTES // 65536):
        yield b" " * 65536


@pytest.mark.parametrize("is_chunked", [False, True], ids=["content-length", "chunked"])
def test_a_large_body_is_refused_without_being_kept(
    disaggregated: Served, is_chunked: bool
) -> None:
    before = front_end_bytes(disaggregated)
    content = slow_upload() if is_chunked else b" " * LARGE_BODY_BYTES
    try:
        response = disaggregated.client.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert "larger than" in response.json()["error"]["message"]
    except httpx.WriteError:
        # The server answered and closed while the client was still sending.
        assert is_chunked
    assert front_end_bytes(disaggregated) - before < MAX_GROWTH_BYTES
