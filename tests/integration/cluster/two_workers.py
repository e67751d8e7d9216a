"""Two workers with simulated engines over real sockets, and what it takes to talk to them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import zmq.asyncio

from cluster.engine import EngineDead, EngineOutput
from cluster.messages import (
    Decode,
    Offer,
    Offered,
    Prefill,
    Prefilled,
    Tokens,
)
from cluster.names import HandoffId, RequestId, Role, RouterId, WorkerId
from cluster.request_plane import Leg, WorkerLink
from cluster.sockets import Sockets
from cluster.worker import Worker
from cluster.worker_spec import WorkerSpec
from deploy.engines import simulated_engine

ROLES = {
    Role.PREFILL: "prefill_workers.role:PrefillRole",
    Role.DECODE: "decode_workers.role:DecodeRole",
}
NUM_BLOCKS = 256
PROMPT = tuple(range(5, 305))
TIMEOUT_S = 1.2
DEADLY = "deadly"


class MortalEngine:
    """A simulated engine that dies of one request."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._engine = simulated_engine(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def outputs(self) -> AsyncIterator[Sequence[EngineOutput]]:
        async for outputs in self._engine.outputs():
            if any(output.request_id == DEADLY for output in outputs):
                raise EngineDead("the engine is gone")
            yield outputs


@dataclass
class Cluster:
    """A prefill and a decode worker, and what it takes to talk to them."""

    context: zmq.asyncio.Context
    prefill: Worker
    decode: Worker
    endpoints: dict[Role, str]
    runs: dict[Role, "asyncio.Task[None]"]

    def link(self, role: Role, router: str = "router-0") -> WorkerLink:
        worker_id = WorkerId(f"{role.value}-0")
        sockets = Sockets(self.context)
        return WorkerLink(sockets, RouterId(router), worker_id, self.endpoints[role], 5.0)

    @asynccontextmanager
    async def router(self, name: str = "router-0") -> AsyncIterator["Router"]:
        router = Router(self.link(Role.PREFILL, name), self.link(Role.DECODE, name))
        yield router
        await router.prefill.close()
        await router.decode.close()


@dataclass
class Router:
    """One router's links to both workers."""

    prefill: WorkerLink
    decode: WorkerLink

    async def prefilled(self, name: str, prompt: tuple[int, ...] = PROMPT) -> Offer:
        leg = self.prefill.open(prefill_message(name, prompt))
        return (await held(leg)).offer

    async def generate(
        self, name: str, offer: Offer | None, prompt: tuple[int, ...] = PROMPT, num: int = 6
    ) -> list[Tokens]:
        with self.decode.open(decode_message(name, offer, prompt, num)) as leg:
            messages: list[Tokens] = []
            while not messages or messages[-1].finish_reason is None:
                message = await leg.receive()
                assert isinstance(message, Tokens), message
                messages.append(message)
        return messages

    async def is_idle(self) -> bool:
        """Whether both workers' latest snapshots show every block free and no request."""
        snapshots = [self.prefill.snapshot, self.decode.snapshot]
        return all(
            snapshot is not None
            and snapshot.num_free_blocks == NUM_BLOCKS - 1
            and snapshot.num_requests == snapshot.num_held_blocks == 0
            for snapshot in snapshots
        )


async def held(leg: Leg) -> Prefilled:
    """Return the answer that the prompt is computed and held."""
    begun, answer = await leg.receive(), await leg.receive()
    assert isinstance(begun, Offered) and isinstance(answer, Prefilled)
    assert begun.offer == answer.offer
    return answer


def prefill_message(name: str, prompt: tuple[int, ...] = PROMPT) -> Prefill:
    return Prefill(RequestId(name), HandoffId(f"h-{name}"), prompt, None, 0)


def decode_message(
    name: str, offer: Offer | None, prompt: tuple[int, ...] = PROMPT, num: int = 6
) -> Decode:
    return Decode(RequestId(name), prompt, {"max_tokens": num}, offer, None, 0)


def tokens_of(messages: list[Tokens]) -> list[int]:
    return [token for message in messages for token in message.token_ids]
