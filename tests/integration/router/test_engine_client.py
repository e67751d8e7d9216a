"""The engine client by itself: what vLLM's serving classes see of an ended generation."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tokenizers import Tokenizer

from cluster import config
from cluster.config import ModelSection
from cluster.errors import Unavailable
from router.exchange import Exchange
from tests.integration.router.fake_flow import FakeFlow

# vLLM uses what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
async def client() -> AsyncIterator[Any]:
    from router.app import build_vllm_config
    from router.engine_client import TandemEngineClient

    tokenizer = Tokenizer.from_file(str(config.BUNDLED_MODEL / "tokenizer.json"))
    flow = FakeFlow(tuple(tokenizer.encode("And it came to pass").ids[1:]))
    client = TandemEngineClient(build_vllm_config(ModelSection()), flow, 8)
    client.flow = flow  # type: ignore[attr-defined]  # for the tests to steer
    yield client
    assert len(flow.endings) == len(flow.requests)
    assert not client._running
    assert not client._output_processor.request_states
    assert not client._output_processor.parent_requests
    assert not client._output_processor.external_req_ids
    client.shutdown()


def generate(client: Any, request_id: str = "a", n: int = 1, **options: Any) -> Any:
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = SamplingParams(n=n, max_tokens=8, output_kind=RequestOutputKind.DELTA)
    return client.generate(tokens_input([0, 20, 21]), sampling, request_id, **options)


async def collect(outputs: Any) -> list[Any]:
    return [output async for output in outputs]


async def finish_reasons(outputs: Any) -> set[str | None]:
    return {choice.finish_reason for output in await collect(outputs) for choice in output.outputs}


@pytest.mark.parametrize("n", [1, 3])
async def test_generation_runs_to_its_end(client: Any, n: int) -> None:
    outputs = await collect(generate(client, n=n))
    assert outputs[-1].finished
    assert sum(len(choice.token_ids) for out in outputs for choice in out.outputs) == 8 * n
    assert client.flow.endings == ["finished"] * n


@pytest.mark.parametrize("n", [1, 3])
async def test_abort_by_id_ends_the_stream(client: Any, n: int) -> None:
    client.flow.hang_at = 2
    task = asyncio.create_task(finish_reasons(generate(client, "a", n)))
    other = asyncio.create_task(finish_reasons(generate(client, "b")))
    await asyncio.sleep(0.05)
    await client.abort("a")
    assert await asyncio.wait_for(task, 1) == {None, "abort"}
    assert client.flow.endings == ["cancelled"] * n
    await client.abort(["b", "unknown"])
    assert await asyncio.wait_for(other, 1) == {None, "abort"}


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_the_generator_ends_the_flow(client: Any, n: int) -> None:
    client.flow.hang_at = 2
    outputs = generate(client, n=n)
    await anext(outputs)
    await asyncio.wait_for(outputs.aclose(), 1)
    assert client.flow.endings == ["cancelled"] * n


async def test_cancelling_the_reader_ends_the_flow(client: Any) -> None:
    client.flow.hang_at = 0
    task = asyncio.create_task(collect(generate(client)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.flow.endings == ["cancelled"]


async def test_failure_ends_siblings_before_it_is_raised(client: Any) -> None:
    client.flow.failure, client.flow.fail_at = Unavailable("no worker"), 3
    with pytest.raises(Exception, match="no worker") as caught:
        await collect(generate(client, n=3))
    assert caught.value.status_code == 503  # type: ignore[attr-defined]
    assert len(client.flow.endings) == 3


async def test_closed_exchange_starts_nothing(client: Any, monkeypatch: Any) -> None:
    exchange = Exchange("gone")
    exchange.close()
    monkeypatch.setattr("router.engine_client.current_exchange", lambda: exchange)
    assert await collect(generate(client)) == []
    assert not client.flow.requests


async def test_adapters_and_raw_streams_are_refused(client: Any) -> None:
    with pytest.raises(Exception, match="LoRA"):
        await collect(generate(client, lora_request=object()))
    with pytest.raises(Exception, match="rendered"):
        await collect(client.generate(generate(client), None, "a"))
    assert not client.flow.requests


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize("extra", [{"a": nested(20)}, {"a": "x" * (9 << 20)}, {"a": "\ud800"}])
async def test_what_no_worker_would_take_is_refused(client: Any, extra: Any) -> None:
    """A worker drops such a message, and the request would wait for its deadline."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams

    sampling = SamplingParams(max_tokens=8, extra_args=extra)
    with pytest.raises(Exception, match="parameter") as caught:
        await collect(client.generate(tokens_input([0, 20, 21]), sampling, "a"))
    assert caught.value.status_code == 400  # type: ignore[attr-defined]
    assert not client.flow.requests


async def test_more_sequences_than_a_request_may_run(client: Any) -> None:
    with pytest.raises(Exception, match=r"router\.max_sequences") as caught:
        await collect(generate(client, n=9))
    assert caught.value.status_code == 400  # type: ignore[attr-defined]
    assert not client.flow.requests
