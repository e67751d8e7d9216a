"""A producing and a consuming engine side by side, for the contract of engines."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster import config as tree
from cluster.config import TandemConfig, parse_config
from cluster.engine import Engine, EngineFacts, EngineLoad, EngineOutput, EngineRequest
from cluster.messages import Offer
from cluster.names import HandoffId, RequestId, Role, WorkerId
from cluster.worker_spec import WorkerSpec
from deploy.engines import simulated_engine, vllm_engine
from tests.waiting import eventually

LEASE_S, STALL_S = 6.0, 3.2
HANDOFF = {"lease_s": LEASE_S, "stall_timeout_s": STALL_S, "chunk_bytes": 1 << 16}
GREEDY: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
FREED_WITHIN_S = 5.0


@dataclass
class Driven:
    """An engine whose outputs are collected by request as they come."""

    engine: Engine
    facts: EngineFacts
    outputs: dict[str, list[EngineOutput]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)

    async def collect(self) -> None:
        async for outputs in self.engine.outputs():
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
                self.ends[output.request_id] += output.finish_reason is not None

    async def run(self, request: EngineRequest) -> list[EngineOutput]:
        """Submit and return everything the engine says of it."""
        await self.engine.submit(request)
        await eventually(lambda: self.has_ended(request.request_id), 60)
        return self.outputs[request.request_id]

    async def has_ended(self, request_id: str) -> bool:
        return self.ends[request_id] > 0

    async def says_something_of(self, request_id: str) -> None:
        async def said() -> bool:
            return bool(self.outputs.get(request_id))

        await eventually(said, 60)

    def forget(self, request_id: str) -> None:
        """What comes under this name from now on is another request's."""
        self.outputs.pop(request_id, None)
        self.ends.pop(request_id, None)

    async def is_idle(self) -> bool:
        load = await self.engine.load()
        return load.num_running == load.num_waiting == load.num_held_handoffs == 0

    async def takes_blocks(self, start: EngineLoad) -> None:
        """Some request has blocks."""

        async def has_some() -> bool:
            return (await self.engine.load()).num_free_blocks < start.num_free_blocks

        await eventually(has_some)

    async def frees_all(self, start: EngineLoad) -> None:
        """Everything is back at its level after start."""

        async def is_free() -> bool:
            load = await self.engine.load()
            return replace(load, counts={}) == replace(start, counts={})

        await eventually(is_free, FREED_WITHIN_S)


@dataclass
class Engines:
    """The producing engine, the consuming one, and their loads after start."""

    producer: Driven
    consumer: Driven
    start: tuple[EngineLoad, EngineLoad]
    num_named: int = 0

    def request(self, num_tokens: int = 300, **fields: Any) -> EngineRequest:
        """Return a request of its own name and, unless given one, its own prompt."""
        self.num_named += 1
        rng = random.Random(self.num_named)
        vocab = self.producer.facts.vocab_size
        prompt = tuple(rng.randrange(10, vocab - 10) for _ in range(num_tokens))
        values: dict[str, Any] = {"prompt_token_ids": prompt, "sampling": GREEDY, **fields}
        return EngineRequest(request_id=RequestId(f"r{self.num_named}"), **values)

    def producing(self, num_tokens: int = 300, **fields: Any) -> EngineRequest:
        request = self.request(num_tokens, **fields)
        return replace(request, produce=HandoffId(f"h-{request.request_id}"))

    async def produced(self, num_tokens: int = 300, **fields: Any) -> tuple[EngineRequest, Offer]:
        request = self.producing(num_tokens, **fields)
        offer = (await self.producer.run(request))[-1].offer
        assert offer is not None
        return request, offer

    async def begun(self, num_tokens: int) -> tuple[EngineRequest, Offer]:
        """Return a producing request whose prompt is being computed."""
        request = self.producing(num_tokens)
        await self.producer.engine.submit(request)
        await self.producer.says_something_of(request.request_id)
        offer = self.producer.outputs[request.request_id][0].offer
        assert offer is not None
        return request, offer

    async def settle(self) -> None:
        await self.producer.frees_all(self.start[0])
        await self.consumer.frees_all(self.start[1])


def _config(model: Path, **model_fields: object) -> TandemConfig:
    facts = {"path": str(model), "max_model_len": 1024, "chunk_tokens": 256, **model_fields}
    return parse_config(
        {
            "model": {"dtype": "float32", "kv_cache_gib": 0.125, **facts},
            "handoff": HANDOFF,
            "simulated": {"prefill_tokens_per_s": 4000},
        }
    )


def simulated_config(folder: Path) -> TandemConfig:
    sizes = {"vocab_size": 4096, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(sizes))
    return _config(folder, engine="simulated")


def vllm_config() -> TandemConfig:
    if not (tree.BUNDLED_MODEL / "model.safetensors").exists():
        pytest.skip(f"{tree.BUNDLED_MODEL} has no weights; train it with deploy.models.train")
    # Nothing here is text.
    return _config(tree.BUNDLED_MODEL, engine_args={"skip_tokenizer_init": True})


def engine_of(config: TandemConfig, role: Role, core: int) -> Engine:
    spec = WorkerSpec(WorkerId(f"{role.value}-0"), role, "", {}, config, (core,), "127.0.0.1")
    return vllm_engine(spec) if config.model.engine == "vllm" else simulated_engine(spec)


def children() -> set[psutil.Process]:
    """Return every process below this one but the interpreter's own resource tracker."""
    living = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                living.add(child)
    return living


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def only(outputs: list[EngineOutput], name: str) -> Any:
    """Return the one value of a field that comes once per request."""
    (value,) = [value for output in outputs if (value := getattr(output, name)) is not None]
    return value


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["simulated", "vllm"],
)
async def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Engines]:
    """Two engines for all tests of this file; every request must have ended at most once, and
    `stop` leaves no process behind."""
    is_simulated = request.param == "simulated"
    config = simulated_config(tmp_path_factory.mktemp("model")) if is_simulated else vllm_config()
    before = children()
    engines = [engine_of(config, Role.PREFILL, 0), engine_of(config, Role.DECODE, 1)]
    driven = [Driven(engine, await engine.start()) for engine in engines]
    loops = [asyncio.create_task(side.collect()) for side in driven]
    loads = await asyncio.gather(*(engine.load() for engine in engines))
    yield Engines(driven[0], driven[1], (loads[0], loads[1]))
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    for engine in engines:
        await engine.stop()
        await engine.stop()
    assert children() <= before, "stop() left processes behind"
    for side in driven:
        assert set(side.ends.values()) <= {0, 1}, "a request ended twice"


@pytest_asyncio.fixture(loop_scope="module")
async def engines(pair: Engines) -> AsyncIterator[Engines]:
    """The pair; both engines' blocks and counts are back at their level after the test."""
    await pair.settle()
    yield pair
    await pair.settle()
