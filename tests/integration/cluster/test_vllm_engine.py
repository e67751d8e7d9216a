"""What a vLLM engine says of requests that share a name, whatever its core says when."""

import asyncio
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from cluster.config import HandoffSection, ModelSection
from cluster.engine import EngineRequest
from cluster.engine_control import CODEC, AskFailure, AskLoad, Begun, DropHandoffs, PullFailure
from cluster.messages import Offer
from cluster.names import HandoffId, RequestId, WorkerId
from cluster.vllm_engine import VllmEngine, VllmEngineSettings
from kv_transfer import protocol
from kv_transfer.protocol import offered_params
from tests.waiting import eventually

X = RequestId("x")


class _Core:
    """Both of the engine's lines out of its processes; says what it is given."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.aborted: list[str] = []
        self.said: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.news: asyncio.Queue[bytes] = asyncio.Queue()
        self.get_output_async, self.recv = self.said.get, self.news.get

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.keys.append(request.request_id)

    async def abort_requests_async(self, keys: list[str]) -> None:
        self.aborted += keys


@pytest.fixture
def core() -> _Core:
    return _Core()


@pytest.fixture
def dropped() -> list[str]:
    """The hand-offs that the engine was told to drop."""
    return []


@pytest.fixture
def engine(core: Any, dropped: list[str], monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    """An engine without processes."""
    model, handoff = ModelSection(path="/nowhere"), HandoffSection()
    settings = VllmEngineSettings(WorkerId("w"), model, handoff, (), protocol)
    engine = VllmEngine(settings)
    engine._client = engine._news = core

    async def ask_load(message: AskLoad | DropHandoffs) -> None:
        assert isinstance(message, DropHandoffs)
        dropped.extend(message.handoff_ids)

    async def control(message: AskFailure) -> PullFailure:
        return PullFailure(f"why {message.key} failed")

    monkeypatch.setattr(engine, "_ask_load", ask_load)
    monkeypatch.setattr(engine, "_control", control)
    return engine


def _offer(name: str) -> Offer:
    return Offer(HandoffId(name), WorkerId("w"), 1, "f", ("tcp://a:1",), 3, 1, 30.0)


def _producing(name: str) -> EngineRequest:
    return EngineRequest(X, (1, 2, 3), {"max_tokens": 8}, produce=HandoffId(name))


def _step(*outputs: EngineCoreOutput) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=list(outputs))


def _held(key: str, name: str) -> EngineCoreOutput:
    params = offered_params(_offer(name))
    return EngineCoreOutput(key, [7], finish_reason=FinishReason.LENGTH, kv_transfer_params=params)


async def test_a_prompt_that_finished_as_it_was_aborted_is_freed_and_not_told(
    engine: VllmEngine, core: _Core, dropped: list[str]
) -> None:
    await engine.submit(_producing("h1"))
    await engine.abort([X])
    await engine.submit(_producing("h2"))
    first, second = core.keys
    assert core.aborted == [first] and first != second
    core.news.put_nowait(CODEC.encode(Begun(first, _offer("h1"))))
    core.said.put_nowait(_step(_held(first, "h1")))
    outputs = engine.outputs()
    told = asyncio.ensure_future(anext(outputs))

    async def has_dropped() -> bool:
        return bool(dropped)

    await eventually(has_dropped)
    assert dropped == ["h1"] and not told.done()
    core.news.put_nowait(CODEC.encode(Begun(second, _offer("h2"))))
    assert [(output.request_id, output.offer) for output in await told] == [(X, _offer("h2"))]
    core.said.put_nowait(_step(_held(second, "h2")))
    assert [(output.request_id, output.offer) for output in await anext(outputs)] == [
        (X, _offer("h2"))
    ]
    assert dropped == ["h1"]
    await engine.abort([X])
    assert core.aborted == [first], "it has ended"


async def test_why_a_pull_failed_is_asked_for_by_its_key(engine: VllmEngine, core: _Core) -> None:
    request = EngineRequest(X, (1, 2, 3), {"max_tokens": 8}, consume=_offer("h"))
    await engine.submit(request)
    await engine.abort([X])
    await engine.submit(request)
    failures = [EngineCoreOutput(key, [], finish_reason=FinishReason.ERROR) for key in core.keys]
    core.said.put_nowait(_step(*failures))
    (output,) = await anext(engine.outputs())
    assert (output.request_id, output.handoff_error) == (X, f"why {core.keys[1]} failed")
