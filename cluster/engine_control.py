"""The worker's line into its engine's scheduler process: local sockets, one each way.

vLLM has no call that reads its block pool or drops a held KV cache, and its error outputs carry
no reason; its connector runs beside the scheduler and answers here. Nor does vLLM say when it
begins to compute a prompt: the connector does, on a line of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zmq

from cluster.messages import Holder, Offer
from cluster.pairing import CacheLayout
from cluster.wire import Codec

PROTOCOL_VERSION = 3
# Behind the control endpoint: where the engine tells its news.
NEWS_SUFFIX = "-news"


def bind_locally(socket: Any, address: str) -> None:
    """Listen at an abstract address. It has no owner: the kernel says whose process connects."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
    socket.bind(address)


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

    request_id: str


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

    request_id: str
    offer: Offer


CODEC = Codec(
    PROTOCOL_VERSION,
    {1: AskLoad, 2: DropHandoffs, 3: BlockLoad, 4: AskFailure, 5: PullFailure, 6: Begun},
)
