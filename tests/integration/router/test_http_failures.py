"""What a client gets when something is wrong: with its request, with us, or with itself."""

import asyncio
import json
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest

from cluster.errors import (
    DeadlineExceeded,
    HandoffFailed,
    Overloaded,
    RequestInvalid,
    Unavailable,
    WorkerLost,
)
from tests.integration.router.endpoint import (
    MAX_BODY_BYTES,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    MODEL,
    Endpoint,
)

# vLLM uses what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "What is wisdom?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: {"model": MODEL, "messages": HELLO, "max_tokens": 4},
    COMPLETIONS: {"model": MODEL, "prompt": "In the", "max_tokens": 4},
}

FAILURES = [
    (Overloaded("queue is full", retry_after_s=2.5), 429, "RateLimitError", "3"),
    (Unavailable("no decode worker"), 503, "ServiceUnavailableError", "1"),
    (WorkerLost("decode-0 is lost"), 503, "ServiceUnavailableError", "1"),
    (HandoffFailed("checksum differs"), 503, "ServiceUnavailableError", "1"),
    (DeadlineExceeded("600 s are over"), 504, "DeadlineExceededError", None),
    (RequestInvalid("too long for any worker"), 400, "BadRequestError", None),
    (KeyError("a bug"), 500, "InternalServerError", None),
]


MANY = [
    (COMPLETIONS, {"n": MAX_SEQUENCES + 1, "temperature": 1}),
    (COMPLETIONS, {"n": 16_384, "temperature": 1}),
    (COMPLETIONS, {"prompt": [[1]] * (MAX_SEQUENCES + 1)}),
    (COMPLETIONS, {"prompt": ["a"] * 3, "n": MAX_SEQUENCES // 2, "temperature": 1}),
    (CHAT, {"n": MAX_SEQUENCES + 1, "temperature": 1}),
    (f"{CHAT}/batch", {"messages": [HELLO] * (MAX_SEQUENCES + 1)}),
]


@pytest.mark.parametrize(("path", "given"), MANY)
def test_more_sequences_than_a_request_may_run(
    endpoint: Endpoint, path: str, given: dict[str, Any]
) -> None:
    body = {**BODIES[CHAT if path.startswith(CHAT) else path], **given}
    answer = endpoint.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert "router.max_sequences" in answer.json()["error"]["message"]
    assert not endpoint.flow.requests
    assert endpoint.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 200


def test_as_many_sequences_as_a_request_may_run(endpoint: Endpoint) -> None:
    body = {**BODIES[COMPLETIONS], "prompt": ["a"] * (MAX_SEQUENCES // 2), "n": 2}
    answer = endpoint.post(COMPLETIONS, json={**body, "temperature": 1})
    assert len(answer.json()["choices"]) == MAX_SEQUENCES


def test_millions_of_prompts_are_refused_before_they_are_rendered(endpoint: Endpoint) -> None:
    prompts = "[" + ",".join(["[1]"] * 1_000_000) + "]"
    body = f'{{"model": "{MODEL}", "prompt": {prompts}}}'
    began_s = time.monotonic()
    assert endpoint.post(COMPLETIONS, content=body, headers=JSON).status_code == 400
    # Read and counted, not rendered.
    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize(("failure", "status", "kind", "retry_after"), FAILURES)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_failure_before_the_first_token(
    endpoint: Endpoint,
    failure: Exception,
    status: int,
    kind: str,
    retry_after: str | None,
    path: str,
    stream: bool,
) -> None:
    endpoint.flow.failure = failure
    answer = endpoint.post(path, json={**BODIES[path], "stream": stream})
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, status, None)
    if status != 500:
        assert error["message"] == str(failure)
    assert answer.headers["x-request-id"] == endpoint.flow.requests[0].exchange_id


def test_the_sdk_sees_typed_errors(endpoint: Endpoint, client: Any) -> None:
    endpoint.flow.failure = Overloaded("queue is full")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="In", stream=True)
    endpoint.flow.failure = Unavailable("no decode worker")
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=MODEL, prompt="In", stream=True)
    assert caught.value.status_code == 503


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_failure_after_the_first_token_is_in_the_stream(endpoint: Endpoint, path: str) -> None:
    endpoint.flow.failure, endpoint.flow.fail_at = WorkerLost("decode-0 is lost"), 2
    answer = endpoint.post(path, json={**BODIES[path], "stream": True})
    assert answer.status_code == 200
    *_, error, done = [line for line in answer.text.splitlines() if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert done == "data: [DONE]"


def test_failure_after_the_first_token_without_a_stream(endpoint: Endpoint) -> None:
    endpoint.flow.failure, endpoint.flow.fail_at = WorkerLost("decode-0 is lost"), 2
    assert endpoint.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 503


def test_one_failing_choice_ends_its_siblings(endpoint: Endpoint) -> None:
    endpoint.flow.failure, endpoint.flow.fail_at = WorkerLost("decode-0 is lost"), 2
    body = {**BODIES[COMPLETIONS], "n": 3, "temperature": 1}
    assert endpoint.post(COMPLETIONS, json=body).status_code == 503
    assert len(endpoint.flow.requests) == 3


BAD_BODIES: dict[str, tuple[str, object, int]] = {
    "not JSON": (CHAT, b'{"model": ', 400),
    "not an object": (CHAT, [1, 2], 400),
    "no messages": (CHAT, {"model": MODEL}, 400),
    "messages of the wrong type": (CHAT, {"model": MODEL, "messages": "hello"}, 400),
    "unknown role": (CHAT, {"model": MODEL, "messages": [{"role": "x", "content": "y"}]}, 400),
    "unknown model": (CHAT, {**BODIES[CHAT], "model": "gpt-9"}, 404),
    "negative max_tokens": (COMPLETIONS, {**BODIES[COMPLETIONS], "max_tokens": -1}, 400),
    "max_tokens of the wrong type": (COMPLETIONS, {**BODIES[COMPLETIONS], "max_tokens": "x"}, 400),
    "temperature out of range": (CHAT, {**BODIES[CHAT], "temperature": 9}, 400),
    "prompt over the context": (
        COMPLETIONS,
        {**BODIES[COMPLETIONS], "prompt": "king " * MAX_MODEL_LEN},
        400,
    ),
    "token out of the vocabulary": (COMPLETIONS, {**BODIES[COMPLETIONS], "prompt": [99999]}, 400),
    "lone surrogate": (COMPLETIONS, b'{"model": "tandem-tiny", "prompt": "\\ud800"}', 400),
    "surrogate stop": (
        COMPLETIONS,
        b'{"model": "tandem-tiny", "prompt": "a", "stop": "\\ud800"}',
        400,
    ),
    "too many logprobs": (
        CHAT,
        {**BODIES[CHAT], "logprobs": True, "top_logprobs": 50, "stream": True},
        400,
    ),
    "bad grammar": (
        CHAT,
        {**BODIES[CHAT], "structured_outputs": {"grammar": "root ::= ("}, "stream": True},
        400,
    ),
    "a hand-off of the client's": (
        CHAT,
        {**BODIES[CHAT], "kv_transfer_params": {"do_remote_prefill": True}},
        400,
    ),
    "deeply nested": (CHAT, b"[" * 100_000, 400),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_request(endpoint: Endpoint, name: str) -> None:
    path, body, status = BAD_BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = endpoint.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["code"] == status
    assert not endpoint.flow.requests


def test_bad_requests_are_refused_quickly(endpoint: Endpoint) -> None:
    path, body, _ = BAD_BODIES["prompt over the context"]
    durations = []
    with httpx.Client() as client:
        for _ in range(40):
            started = time.perf_counter()
            client.post(endpoint.url + path, json=body)
            durations.append(time.perf_counter() - started)
    assert statistics.quantiles(durations, n=20)[-1] < 0.1


def test_deep_json_schema_reaches_the_worker(endpoint: Endpoint) -> None:
    """The wire limits how deep a document nests; a schema within vLLM's limit must pass."""
    schema: dict[str, object] = {"type": "string"}
    for _ in range(25):
        schema = {"type": "object", "properties": {"x": schema}}
    body = {**BODIES[CHAT], "structured_outputs": {"json": schema}}
    assert endpoint.post(CHAT, json=body).status_code == 200
    from cluster.messages import CODEC, Decode

    (request,) = endpoint.flow.requests
    decode = Decode(request.request_id, (1,), request.sampling, None, None, 0)
    assert CODEC.decode(CODEC.encode(decode)) == decode


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("POST", "/scale_elastic_ep", 404)],
)
def test_unknown_routes(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, endpoint.url + path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "caf\u00e9"])
def test_bad_request_id(endpoint: Endpoint, given: str) -> None:
    headers = {"x-request-id": given.encode("latin-1")}
    answer = endpoint.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-id"


def test_large_body_by_its_length(endpoint: Endpoint) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    answer = endpoint.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == 413


def test_large_chunked_body_costs_no_memory(endpoint: Endpoint) -> None:
    """50 MB in chunks: answered within 1 MB over the limit, with little memory."""
    process, part = psutil.Process(), b" " * 65536
    before = peak = process.memory_info().rss
    host, port = endpoint.url.removeprefix("http://").split(":")
    num_sent = 0
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        connection.setblocking(False)
        answer = b""
        while not answer and num_sent < 50 << 20:
            try:
                answer = connection.recv(65536)
            except BlockingIOError:
                connection.setblocking(True)
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
                connection.setblocking(False)
                num_sent += len(part)
                time.sleep(0.001)
            peak = max(peak, process.memory_info().rss)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert num_sent <= MAX_BODY_BYTES + (1 << 20)
    assert peak - before < 10 << 20


def stream_and_leave(endpoint: Endpoint, num_chunks: int) -> None:
    body = {**BODIES[CHAT], "stream": True, "max_tokens": 50}
    with httpx.stream("POST", endpoint.url + CHAT, json=body, timeout=20) as answer:
        for _, _line in zip(range(num_chunks), answer.iter_lines(), strict=False):
            pass


def leave_after(endpoint: Endpoint, stream: bool, n: int = 1) -> None:
    body = {**BODIES[CHAT], "stream": stream, "max_tokens": 50, "n": n, "temperature": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(endpoint.url + CHAT, json=body, timeout=0.3)


LEAVINGS: dict[str, tuple[int, int, Callable[[Endpoint], None]]] = {
    "in a stream": (3, 1, lambda endpoint: stream_and_leave(endpoint, 3)),
    "before a stream": (0, 1, lambda endpoint: leave_after(endpoint, stream=True)),
    "before any token": (0, 1, lambda endpoint: leave_after(endpoint, stream=False)),
    "after some tokens": (3, 1, lambda endpoint: leave_after(endpoint, stream=False)),
    "three choices": (3, 3, lambda endpoint: leave_after(endpoint, stream=True, n=3)),
}


@pytest.mark.parametrize("name", LEAVINGS)
def test_leaving_client_cancels_the_flow(endpoint: Endpoint, name: str) -> None:
    endpoint.flow.hang_at, num_sequences, leave = LEAVINGS[name]
    leave(endpoint)
    expected = ["cancelled"] * num_sequences
    endpoint.wait(lambda: endpoint.flow.endings == expected, within_s=0.5)


def test_nothing_is_left_after_everyone_left(endpoint: Endpoint) -> None:
    endpoint.flow.hang_at = 2

    async def leave(client: httpx.AsyncClient, index: int) -> None:
        body = {**BODIES[CHAT], "stream": index % 2 == 0, "max_tokens": 50}
        with pytest.raises(httpx.ReadTimeout):
            await client.post(endpoint.url + CHAT, json=body, timeout=0.1 + index / 100)

    async def leave_all() -> None:
        async with httpx.AsyncClient() as client:
            await asyncio.gather(*(leave(client, index) for index in range(30)))

    asyncio.run(leave_all())
    endpoint.wait(lambda: len(endpoint.flow.endings) == len(endpoint.flow.requests))
    assert set(endpoint.flow.endings) <= {"cancelled"}


def test_body_in_chunks_within_the_limit(endpoint: Endpoint) -> None:
    content = json.dumps(BODIES[COMPLETIONS]).encode()
    headers = {"content-type": "application/json"}
    answer = endpoint.post(COMPLETIONS, content=iter([content[:7], content[7:]]), headers=headers)
    assert answer.status_code == 200
