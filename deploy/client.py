"""A client of the endpoint that times every token: what replays and pressure tests are made of."""

import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from cluster.errors import Unavailable
from deploy.report import Replayed


def context_of(url: str) -> int:
    """Return the longest prompt with its output that the served model takes, in tokens."""
    return int(_model_of(url)["max_model_len"])


def model_of(url: str) -> str:
    """Return the served model's name in the API."""
    return str(_model_of(url)["id"])


def _model_of(url: str) -> dict[str, Any]:
    try:
        models = (
            httpx.get(f"{url}/v1/models", timeout=10.0, trust_env=False).raise_for_status().json()
        )
        document: dict[str, Any] = models["data"][0]
        return document
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise Unavailable(f"{url}/v1/models: {error}") from None


async def stream(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], replayed: Replayed
) -> str:
    """Receive one completion of a prompt's tokens; return the id of the router's record of it."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": replayed.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        # An answer may carry several tokens, so each says how many there are by now.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    is_complete = False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            replayed.error = f"HTTP {response.status_code}: {text[:300]}"
        async for line in response.aiter_lines():
            is_complete = is_complete or line == "data: [DONE]"
            if line.startswith("data: {"):
                _take(json.loads(line.removeprefix("data: ")), replayed)
        exchange_id: str = response.headers["x-request-id"]
    if not is_complete and replayed.error is None:
        replayed.error = "the stream broke off"
    return exchange_id


def _take(chunk: dict[str, Any], replayed: Replayed) -> None:
    if "error" in chunk:
        replayed.error = str(chunk["error"])
        return
    usage = chunk["usage"]
    is_news = usage["completion_tokens"] > replayed.received_tokens
    replayed.received_tokens = usage["completion_tokens"]
    if usage["prompt_tokens"] != replayed.prompt_tokens:
        got = usage["prompt_tokens"]
        replayed.error = f"{got} prompt tokens counted, {replayed.prompt_tokens} sent"
    if is_news:
        replayed.token_times.append(time.monotonic())
        replayed.token_counts.append(replayed.received_tokens)
