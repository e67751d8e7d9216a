"""The worker's lines into its engine's processes: local sockets.

vLLM has no call that reads its block pool or drops a held KV cache, and its error outputs carry
no reason; its connector runs beside the scheduler and answers here. Nor does vLLM say when it
begins to compute a prompt: the connector does, on a line of its own. And what vLLM's scheduler
tells its ranks comes with a step, after those scheduled before it: what has no such time is said
on a line to each rank.

A `key` is what vLLM knows a request by.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from cluster.messages import Holder, Offer
from cluster.pairing import CacheLayout
from cluster.wire import Codec

PROTOCOL_VERSION = 5
# Behind the control endpoint: where the engine tells its news.
NEWS_SUFFIX = "-news"


def bind_locally(socket: Any, address: str) -> None:
    """Listen at an abstract address. It has no owner: the kernel says whose process connects."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
    socket.bind(address)


class RankLines:
    """Says things to every rank of an engine, from one thread; never waits for them."""

    def __init__(self, control_endpoint: str, num_ranks: int) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._sockets = [context.socket(zmq.PUSH) for _ in range(num_ranks)]
        for rank, socket in enumerate(self._sockets):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(rank_endpoint(control_endpoint, rank))

    def send(self, message: "Attend | HoldNow") -> None:
        frame = CODEC.encode(message)
        for socket in self._sockets:
            socket.send(frame)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


def rank_endpoint(control_endpoint: str, rank: int) -> str:
    """Return where the connector of one rank listens."""
    return f"{control_endpoint}-rank-{rank}"


@dataclass(frozen=True, slots=True)
class AskLoad:
    """Worker to engine: what is free, what is held?"""


@dataclass(frozen=True, slots=True)
class DropHandoffs:
    """Worker to engine: nobody will pull these; free their blocks."""

    handoff_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskFailure:
    """Worker to engine: why did this request's pull fail? Answered once."""

    key: str


@dataclass(frozen=True, slots=True)
class PullFailure:
    """Engine to worker: the reason; None if no pull of the request has failed."""

    reason: str | None


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Engine to worker: the block pool, and the KV-plane port's address and layout."""

    num_blocks: int
    num_free_blocks: int
    num_held_blocks: int
    num_held_handoffs: int
    endpoints: tuple[str, ...]
    layout: CacheLayout
    block_size: int
    counts: Mapping[str, object]
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """Engine to worker, unasked: the prompt is being computed, and its blocks can be pulled."""

    key: str
    offer: Offer


@dataclass(frozen=True, slots=True)
class Attend:
    """To a rank: there is, or is about to be, something to schedule; do not sleep over it."""


@dataclass(frozen=True, slots=True)
class HoldNow:
    """Engine to rank: a prompt is finished. `block_ids` are its blocks by group and position,
    `first_token` what was sampled from it; with the next step the same is said once more."""

    handoff_id: str
    key: str
    block_ids: tuple[tuple[int, ...], ...]
    first_token: int


CODEC = Codec(
    PROTOCOL_VERSION,
    {
        1: AskLoad,
        2: DropHandoffs,
        3: BlockLoad,
        4: AskFailure,
        5: PullFailure,
        6: Begun,
        7: Attend,
        8: HoldNow,
    },
)
