"""One endpoint for the tests of this folder: it costs the import of vLLM."""

import asyncio
import threading
from collections.abc import Iterator

import openai
import pytest
from tokenizers import Tokenizer

from cluster import config
from tests.integration.router.endpoint import ANSWER, Endpoint, serve
from tests.integration.router.fake_flow import FakeFlow


@pytest.fixture(scope="session")
def running_endpoint() -> Iterator[Endpoint]:
    tokenizer = Tokenizer.from_file(str(config.BUNDLED_MODEL / "tokenizer.json"))
    answer = tuple(tokenizer.encode(ANSWER, add_special_tokens=False).ids)
    endpoint = Endpoint("", FakeFlow(answer), tokenizer)
    started, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve(endpoint, started, stop)))
    thread.start()
    while not started.wait(0.1):
        assert thread.is_alive(), "the endpoint did not start"
    yield endpoint
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def endpoint(running_endpoint: Endpoint) -> Iterator[Endpoint]:
    """The endpoint with a well-behaved flow; every generation must have ended by itself."""
    running_endpoint.flow.reset()
    running_endpoint.health = (True, "ok")
    yield running_endpoint
    flow = running_endpoint.flow
    running_endpoint.wait(lambda: len(flow.endings) == len(flow.requests))


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client
