"""A producing engine and a consuming one, driven directly."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.engine import Engine, EngineFacts, EngineLoad, EngineOutput, EngineRequest
from cluster.messages import Offer
from cluster.names import HandoffId, RequestId
from tests.waiting import eventually

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

    async def is_idle(self) -> bool:
        load = await self.engine.load()
        return load.num_running == load.num_waiting == load.num_held_handoffs == 0

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

    async def settle(self) -> None:
        await self.producer.frees_all(self.start[0])
        await self.consumer.frees_all(self.start[1])


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def only(outputs: list[EngineOutput], name: str) -> Any:
    """Return the one value of a field that comes once per request."""
    (value,) = [value for output in outputs if (value := getattr(output, name)) is not None]
    return value
