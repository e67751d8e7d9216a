"""What a worker asks of an engine; vLLM and the simulated engine fill it.

An engine is driven from one asyncio loop. `submit` never blocks on computation: everything
an engine has to say about a request arrives from `outputs`, in order, and ends with exactly
one output whose `finish_reason` is set. A request that has ended or was aborted leaves its name
to another at once, whatever the engine still does with its blocks.
"""

import heapq
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.messages import Holder, Offer, PrefillStats, Receipt
from cluster.names import FinishReason, HandoffId, RequestId
from cluster.pairing import CacheLayout

_HOLDERS_NAMED = 5


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is fixed once an engine is ready."""

    model: str
    block_size: int
    num_blocks: int
    max_model_len: int
    vocab_size: int
    epoch: int
    layout: CacheLayout
    is_simulated: bool


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One leg of a request. `produce` holds the KV cache after one token, unless this token ends
    the request by `sampling`; `consume` pulls it. At most one of the two is set; with neither
    the engine prefills and decodes.

    `first_token` was sampled elsewhere: the engine generates what follows it. `sampling` counts
    it, stats do not. With `awaits_token` it is not known yet and comes with the KV cache.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, object]
    produce: HandoffId | None = None
    consume: Offer | None = None
    cache_salt: str | None = None
    priority: int = 0
    first_token: int | None = None
    awaits_token: bool = False


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One request's news from one engine step.

    `offer` comes when a producing request's prompt begins to be computed, unless it is known to
    end with its first token, and again with its finish; `handoff_error` with the `ERROR`
    finish of a consuming one whose KV cache did not arrive.
    """

    request_id: RequestId
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: Mapping[str, object] | None = None
    prompt_logprobs: Mapping[str, object] | None = None
    stats: PrefillStats | None = None
    offer: Offer | None = None
    receipt: Receipt | None = None
    handoff_error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Read from the engine's own scheduler and block pool at the time of the call.

    `counts` are the KV plane's totals by kind: hand-offs ended, reads refused, chunks rejected.
    `holders` are the held KV caches with the most block-seconds, `top_holders` of them all.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_held_blocks: int
    num_held_handoffs: int
    counts: Mapping[str, int]
    holders: tuple[Holder, ...] = ()


def top_holders(held: Iterable[Holder]) -> tuple[Holder, ...]:
    """Return the few that cost the most so far, the dearest first."""
    return tuple(heapq.nlargest(_HOLDERS_NAMED, held, key=lambda holder: holder.block_s))


class EngineDead(Exception):
    """The engine's processes are gone or stopped answering; the worker cannot go on."""


class HandoffWords(Protocol):
    """How an engine's connector spells hand-offs in a request's parameters."""

    def produce_params(self, handoff_id: HandoffId) -> dict[str, Any]: ...

    def consume_params(self, offer: Offer, awaits_token: bool) -> dict[str, Any]: ...

    def offered(self, params: Mapping[str, Any] | None) -> Offer | None: ...


@dataclass(frozen=True, slots=True)
class EndedPull:
    """A pull that is over; `failure` is None when every block is in place, and with them the
    first token, where it was awaited."""

    key: str
    failure: str | None
    receipt: Receipt
    first_token: int | None = None


class HandoffPort(Protocol):
    """The KV plane as an engine without vLLM sees it: its blocks, held, pulled and ended.

    Calls return at once; ends come from `take_freed` and `take_pulls`, each key once.
    """

    endpoints: tuple[str, ...]
    layout: CacheLayout

    def write(self, block_id: int, content: bytes) -> None: ...

    def read(self, block_id: int) -> bytes: ...

    def open(self, key: str, handoff_id: HandoffId) -> None: ...

    def grow(self, handoff_id: HandoffId, block_ids: Sequence[int]) -> None: ...

    def hold(
        self, key: str, handoff_id: HandoffId, block_ids: Sequence[int], first_token: int
    ) -> None: ...

    def abandon(self, key: str, handoff_id: HandoffId) -> None: ...

    def drop(self, handoff_id: HandoffId) -> None: ...

    def pull(
        self, key: str, offer: Offer, block_ids: Sequence[int], awaits_token: bool
    ) -> None: ...

    def announce(self, offer: Offer) -> None: ...

    def give_up(self, offer: Offer) -> None: ...

    def cancel(self, key: str) -> None: ...

    def take_freed(self) -> Sequence[str]: ...

    def take_pulls(self) -> Sequence[EndedPull]: ...

    def totals(self) -> Mapping[str, int]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """Raises `EngineDead` from any method once the engine cannot go on."""

    async def start(self) -> EngineFacts: ...

    async def submit(self, request: EngineRequest) -> None: ...

    def outputs(self) -> AsyncIterator[Sequence[EngineOutput]]: ...

    async def abort(self, request_ids: Sequence[RequestId]) -> None:
        """End open requests wherever they are, what they hold with them; no output follows."""

    async def release(self, handoff_ids: Sequence[HandoffId]) -> None: ...

    async def load(self) -> EngineLoad: ...

    async def stop(self) -> None: ...
