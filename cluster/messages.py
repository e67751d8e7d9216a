"""The request and token plane: every message between a router and a worker, in flow order.

Routers hold a DEALER per worker, workers one ROUTER; one ZeroMQ frame per message, several
messages per multipart. `PROTOCOL_VERSION` history:

1. first version.
2. a receipt names the transport.
3. prefill may sample the first token, and decode goes on from it; a prompt's blocks are offered
   when it begins to be computed.
4. a snapshot names what pins the most blocks; an offer says how large its own are.
5. a heartbeat is answered with a tally, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.names import FinishReason, HandoffId, RequestId, Role, RouterId, WorkerId
from cluster.wire import Codec

PROTOCOL_VERSION = 5
# How a first token that prefill has sampled ends its request.
FIRST_IS_LAST = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a producer says of a KV cache it holds; carried unread from prefill to decode.

    `endpoints` has one KV-plane address per tensor-parallel rank. `epoch` names one life of
    the producer's engine and `fingerprint` its block layout; a read that differs in either is
    refused. `lease_s` is a duration: clocks are never compared across machines. `block_size` is
    the producer's, in tokens; None is the reader's own.
    """

    handoff_id: HandoffId
    worker_id: WorkerId
    epoch: int
    fingerprint: str
    endpoints: tuple[str, ...]
    num_tokens: int
    num_blocks: int
    lease_s: float
    block_size: int | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Router to worker, several a second: a silence of `router.worker_timeout_s` aborts the
    requests of a router whose connection is gone, one of three times as long those of any.

    `num_asked` counts what the router has sent before over the same link, heartbeats left out.
    """

    router_id: RouterId
    num_asked: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Worker to router, first in answer to each heartbeat: what has come and gone by now.

    `num_asked` is the heartbeat's, and so many of those messages have come: `num_received`.
    `num_answers` is what the worker has sent to this router, tallies and snapshots left out. What
    follows from them is in `cluster/tallies.py`.
    """

    num_asked: int
    num_received: int
    num_answers: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Router to worker: run the prompt, hold its KV cache under `handoff_id`.

    With `sampling`, the client's, the first token is sampled here too; if it ends the request,
    the answer is `Tokens` and nothing is held.
    """

    request_id: RequestId
    handoff_id: HandoffId
    prompt_token_ids: tuple[int, ...]
    cache_salt: str | None
    priority: int
    sampling: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Decode:
    """Router to worker: generate; pull the prompt's KV cache from `offer` unless it is None.

    `sampling` is vLLM's `SamplingParams` as a document; the simulated engine reads
    `max_tokens` and `ignore_eos` of it. The client has `first_token` already: the answer begins
    with the second. With `awaits_token` decode is to hear of it with the KV cache.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: Mapping[str, object]
    offer: Offer | None
    cache_salt: str | None
    priority: int
    first_token: int | None = None
    awaits_token: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Router to worker: end this request's leg here and free its blocks, held ones too."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Controller to worker: take nothing more in another role, serve in `role` once idle.

    A worker ignores a controller whose epoch is below the highest it has heard of.
    """

    role: Role
    controller_epoch: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """Worker to router: not taken; decide again. Never an error of the client's."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """The engine's own count of where a leg's prompt tokens came from."""

    num_prompt_tokens: int
    num_computed_tokens: int
    num_local_cached_tokens: int
    num_transferred_tokens: int


@dataclass(frozen=True, slots=True)
class Offered:
    """Worker to router: the prompt is being computed, its blocks can be pulled as they come."""

    request_id: RequestId
    offer: Offer


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Worker to router: the prompt is computed and held; `first_token` if that was asked for."""

    request_id: RequestId
    offer: Offer
    stats: PrefillStats
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the decode side received, beside what the producer says it sent.

    `transport` is how: `shm`, `tcp`, several as `cma+shm`, or empty if nothing was needed.
    """

    num_blocks: int
    received_bytes: int
    produced_bytes: int
    transfer_s: float
    transport: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Worker to router: newly generated tokens of one request; prefill's only if they are all.

    `num_before` counts the leg's tokens sent before these: a gap shows at once that a message was
    lost on the way.
    `logprobs` and `prompt_logprobs` are documents shaped as vLLM's `LogprobsLists`; `stats` is
    on the first message and `receipt`, where KV was pulled, on one message of the request.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: Mapping[str, object] | None = None
    prompt_logprobs: Mapping[str, object] | None = None
    stats: PrefillStats | None = None
    receipt: Receipt | None = None
    num_before: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker to router: the leg ended without finishing; `kind` says what may be done."""

    request_id: RequestId
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Holder:
    """A held KV cache, as long as its producer has known of it: blocks that nobody else can use."""

    handoff_id: HandoffId
    num_blocks: int
    held_s: float

    @property
    def block_s(self) -> float:
        return self.num_blocks * self.held_s


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """Worker to router, in answer to each heartbeat: the worker's own view of its load.

    `generated_tokens` (decode role), `computed_prompt_tokens` (prefill role, cached ones left
    out) and `busy_s` (seconds with a request open) only grow within one epoch. `holders` are
    those with the most block-seconds.
    """

    worker_id: WorkerId
    role: Role
    epoch: int
    num_running: int
    num_waiting: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_held_blocks: int
    num_held_handoffs: int
    num_requests: int
    generated_tokens: int
    computed_prompt_tokens: int
    busy_s: float
    counts: Mapping[str, object]
    holders: tuple[Holder, ...] = ()


CODEC = Codec(
    PROTOCOL_VERSION,
    {
        1: Heartbeat,
        2: Prefill,
        3: Decode,
        4: Cancel,
        5: Rejected,
        6: Prefilled,
        7: Tokens,
        8: Failed,
        9: WorkerSnapshot,
        10: ChangeRole,
        11: Offered,
        12: Tally,
    },
)

RouterMessage = Heartbeat | Prefill | Decode | Cancel | ChangeRole
WorkerMessage = Rejected | Offered | Prefilled | Tokens | Failed | WorkerSnapshot | Tally
