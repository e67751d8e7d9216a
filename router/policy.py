"""Step 2: which workers serve a request. Pure: frozen inputs in, one decision with its reason out.

Decode is chosen first, since the stream stays there; then a prefill worker near it, unless the
prompt is better computed by the decode worker itself. One pass over the workers per decision.
"""

import enum
from collections.abc import Set
from dataclasses import dataclass
from random import Random

from cluster.config import RouterSection
from cluster.names import WorkerId
from kv_transfer.layout import num_blocks_for

RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A ready worker as one router sees it at the moment of a decision.

    `num_reserved` counts this router's prompts being computed (prefill) or streams (decode),
    `reserved_tokens` the prompt tokens of the former. `num_waiting` is the worker's own report,
    up to a heartbeat old; it is how the load of other routers shows. `num_free_blocks` of
    `num_blocks`, of `block_size` tokens, are neither in use nor promised. Workers hand over only
    to those of the same `layout`, a fingerprint.
    """

    worker_id: WorkerId
    domain: str
    num_reserved: int
    reserved_tokens: int
    num_waiting: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    layout: str = ""

    def has_memory(self, num_prompt_tokens: int) -> bool:
        """Whether prompt and first token fit; what never can is the engine's to refuse."""
        wanted = num_blocks_of(num_prompt_tokens, self.block_size)
        # vLLM keeps one block for itself.
        return min(wanted, self.num_blocks - 1) <= self.num_free_blocks


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """Both pools' ready workers, and the queue in front of them.

    `is_behind` says that somebody who came before this request is still waiting.
    """

    prefill: tuple[WorkerView, ...]
    decode: tuple[WorkerView, ...]
    num_queued: int = 0
    is_behind: bool = False


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What the policy needs of a request.

    `local_only` is the client's doing (echo, prompt logprobs), `is_last_resort` recovery's.
    `excluded` workers are never chosen again, `avoided` ones only if no other has room. An
    admitted request has once been accepted and is not turned away for a full queue.
    """

    num_prompt_tokens: int
    local_only: bool = False
    is_last_resort: bool = False
    is_admitted: bool = False
    excluded: frozenset[WorkerId] = frozenset()
    avoided: frozenset[WorkerId] = frozenset()


@dataclass(frozen=True, slots=True)
class Placed:
    """Serve it here; no prefill worker means that decode computes the prompt.

    `expects_handoff` is false only where computing on decode is the better way, so that a
    prompt computed there for want of a hand-off is told apart.
    """

    decode_worker: WorkerId
    prefill_worker: WorkerId | None
    num_prompt_tokens: int
    expects_handoff: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Queued:
    """No room; decide again when some is given back."""

    reason: str


class Rejection(enum.StrEnum):
    """What a refused request is told."""

    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    EXHAUSTED = "exhausted"


@dataclass(frozen=True, slots=True)
class RejectedPlacement:
    """Not served; `EXHAUSTED` means that every decode worker has failed this request."""

    rejection: Rejection
    reason: str
    retry_after_s: float = RETRY_AFTER_S


Decision = Placed | Queued | RejectedPlacement


def num_blocks_of(num_prompt_tokens: int, block_size: int) -> int:
    """Return the blocks of a prompt and of the token after it."""
    return num_blocks_for(num_prompt_tokens + 1, block_size)


def choose_placement(
    snapshot: PoolSnapshot,
    request: PlacementRequest,
    config: RouterSection,
    rng: Random | None = None,
) -> Decision:
    """Return where `request` goes; equal workers are told apart by `rng`, else by order."""
    if not snapshot.decode:
        return RejectedPlacement(Rejection.UNAVAILABLE, "no decode worker is ready")
    able = [view for view in snapshot.decode if view.worker_id not in request.excluded]
    if not able:
        reason = "every ready decode worker has refused or failed this request"
        return RejectedPlacement(Rejection.EXHAUSTED, reason)
    if snapshot.is_behind:
        return _wait(snapshot, request, config, "earlier requests are waiting")
    roomy = [view for view in able if view.num_reserved < config.decodes_per_worker]
    if not roomy:
        return _wait(snapshot, request, config, "the decode pool is full")
    # A prompt computed for a worker without memory would keep its blocks on the prefill worker.
    roomy = [view for view in roomy if view.has_memory(request.num_prompt_tokens)]
    if not roomy:
        return _wait(snapshot, request, config, "the decode pool has no free KV blocks for it")
    layouts = {v.layout for v in snapshot.prefill if v.worker_id not in request.excluded}
    decode = min(roomy, key=lambda view: _decode_rank(view, request, layouts, rng))
    local = _local(decode, snapshot, request, config)
    return local or _with_prefill(decode, snapshot, request, config, rng)


def _wait(
    snapshot: PoolSnapshot, request: PlacementRequest, config: RouterSection, reason: str
) -> Queued | RejectedPlacement:
    if request.is_admitted or snapshot.num_queued < config.max_queued:
        return Queued(reason)
    full = f"{reason} and {snapshot.num_queued} requests are queued"
    return RejectedPlacement(Rejection.OVERLOADED, full)


def _local(
    decode: WorkerView, snapshot: PoolSnapshot, request: PlacementRequest, config: RouterSection
) -> Placed | None:
    """Return a placement on the decode worker alone where that is right or all there is."""

    def placed(reason: str, expects_handoff: bool) -> Placed:
        num_tokens = request.num_prompt_tokens
        return Placed(decode.worker_id, None, num_tokens, expects_handoff, reason)

    if request.local_only:
        return placed("local prefill: the request cannot use a transferred KV cache", False)
    if request.num_prompt_tokens <= config.local_prefill_tokens:
        return placed(f"local prefill: at most {config.local_prefill_tokens} prompt tokens", False)
    if request.is_last_resort:
        return placed("local prefill: hand-offs of this request have failed", True)
    if not snapshot.prefill:
        return placed("local prefill: no prefill worker is ready", True)
    if all(view.worker_id in request.excluded for view in snapshot.prefill):
        return placed("local prefill: every prefill worker has refused or failed it", True)
    if not any(_fits(view, decode, request) for view in snapshot.prefill):
        return placed("local prefill: no prefill worker's KV cache fits", True)
    return None


def _with_prefill(
    decode: WorkerView,
    snapshot: PoolSnapshot,
    request: PlacementRequest,
    config: RouterSection,
    rng: Random | None,
) -> Decision:
    limit = config.prefills_per_worker
    fitting = [view for view in snapshot.prefill if _fits(view, decode, request)]
    roomy = [view for view in fitting if view.num_reserved < limit]
    if not roomy:
        return _wait(snapshot, request, config, "the prefill pool is full")
    prefill = min(roomy, key=lambda view: _prefill_rank(view, decode, request, rng))
    where = "in its domain" if prefill.domain == decode.domain else "in another domain"
    reason = (
        f"decode with {decode.num_reserved} streams and {decode.num_waiting} waiting; prefill"
        f" {where} with {prefill.reserved_tokens} tokens and {prefill.num_waiting} waiting"
    )
    return Placed(decode.worker_id, prefill.worker_id, request.num_prompt_tokens, True, reason)


def _fits(prefill: WorkerView, decode: WorkerView, request: PlacementRequest) -> bool:
    return prefill.layout == decode.layout and prefill.worker_id not in request.excluded


def _decode_rank(
    view: WorkerView, request: PlacementRequest, layouts: Set[str], rng: Random | None
) -> tuple[bool, bool, int, float]:
    """Who has somebody to pull from comes first; `layouts` are those of prefill workers."""
    tie = rng.random() if rng else 0.0
    load = view.num_reserved + view.num_waiting
    return view.layout not in layouts, view.worker_id in request.avoided, load, tie


def _prefill_rank(
    view: WorkerView, decode: WorkerView, request: PlacementRequest, rng: Random | None
) -> tuple[bool, bool, int, float]:
    # Prompts that wait at the worker have unknown lengths: each is taken for one like this.
    load = view.reserved_tokens + view.num_waiting * request.num_prompt_tokens
    tie = rng.random() if rng else 0.0
    return view.worker_id in request.avoided, view.domain != decode.domain, load, tie
