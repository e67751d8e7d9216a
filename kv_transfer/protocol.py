"""Every byte between a producer and a consumer of KV caches, and vLLM's spelling of an offer.

A message is one frame; `Blocks` is followed by one payload frame if it goes `Via.TCP`. The
consumer drives: it reads, the producer answers, so a consumer without memory simply does not
ask. Before its first read it greets the producer, and both know how payloads will go. A read of
blocks that are not computed yet is answered when they are.
`PROTOCOL_VERSION` history:

1. first version: pull by block range, xxh3-64 per chunk, leases by duration.
2. transports: `Greet` and `Welcome`, parcels named in `Blocks` and taken in `ReadBlocks`.
3. blocks leave while the prompt is computed: `Filling`; `Blocks` say for how long it has been
   complete and bring the first token.
4. reads name, with each way, where its reader is found: some ways make the producer connect.
5. `cuda_ipc`; `cma`: `Blocks` name blocks that their reader copies from where they are.
"""

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from cluster.wire import Codec

PROTOCOL_VERSION = 5


class Refusal(enum.StrEnum):
    """Why a producer does not serve a read."""

    UNKNOWN = "unknown"
    STALE_EPOCH = "stale_epoch"
    LAYOUT = "layout"
    RANGE = "range"
    ENDED = "ended"
    MALFORMED = "malformed"
    TRANSPORT = "transport"
    CROWDED = "crowded"


class Via(enum.StrEnum):
    """How payloads get from a producer to a consumer."""

    INPROC = "inproc"
    CMA = "cma"
    SHM = "shm"
    TCP = "tcp"
    CUDA_IPC = "cuda_ipc"
    GLOO = "gloo"
    NCCL = "nccl"

    @property
    def is_in_place(self) -> bool:
        """Whether blocks are read where they are, without a copy that is theirs to keep."""
        return self is Via.CMA


@dataclass(frozen=True, slots=True)
class Greet:
    """Consumer to producer, before the first read from one life of it: which ways are there?"""

    epoch: int
    vias: tuple[Via, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one side of a transport is found by the other; nothing else reads the address."""

    via: Via
    address: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Producer to consumer: those of the ways asked for that exist here; its true epoch."""

    epoch: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Consumer to producer: send these blocks; epoch and fingerprint are checked first.

    `ways` are those that work, best first, and where the reader is found on each; `taken` are
    parcels of this hand-off that have been read, so that their memory can be used again.
    """

    handoff_id: HandoffId
    epoch: int
    fingerprint: str
    group: int
    first_block: int
    num_blocks: int
    ways: tuple[Place, ...] = (Place(Via.TCP, ""),)
    taken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """Producer to consumer: the blocks are in `parcel` of `via`, region by region.

    `checksum` is 64 bits of the payload (`BlockStore.checksum`), None when off or in place;
    `produced_bytes` counts what the producer has sent for this hand-off so far, this payload
    included. `held_s` is how long the whole prompt has been held, None while it is computed;
    `first_token` is what was sampled from it; `block_ids` are the producer's, if they are read
    in place.
    """

    handoff_id: HandoffId
    group: int
    first_block: int
    num_blocks: int
    payload_bytes: int
    checksum: int | None
    produced_bytes: int
    via: Via
    parcel: int
    held_s: float | None = None
    first_token: int | None = None
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Filling:
    """Producer to consumer: your reads wait for blocks that are being computed."""

    handoff_id: HandoffId


@dataclass(frozen=True, slots=True)
class Refused:
    """Producer to consumer: the read is refused; the hand-off is over for this consumer."""

    handoff_id: HandoffId
    cause: Refusal
    detail: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Consumer to producer: still wanted; restart the lease. `taken` is as in a read."""

    handoff_id: HandoffId
    epoch: int
    taken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Release:
    """Consumer to producer: done with it, whether loaded or given up; free the blocks."""

    handoff_id: HandoffId
    epoch: int
    is_loaded: bool


CODEC = Codec(
    PROTOCOL_VERSION,
    {
        1: ReadBlocks,
        2: Blocks,
        3: Refused,
        4: Renew,
        5: Release,
        6: Greet,
        7: Welcome,
        8: Filling,
    },
)

ConsumerMessage = Greet | ReadBlocks | Renew | Release
ProducerMessage = Welcome | Blocks | Filling | Refused

_CONSUME, _PRODUCE = "do_remote_prefill", "do_remote_decode"


def produce_params(handoff_id: HandoffId) -> dict[str, Any]:
    """Return the `kv_transfer_params` that make vLLM hold a request's KV cache."""
    return {_PRODUCE: True, "handoff_id": handoff_id}


def consume_params(offer: Offer, awaits_token: bool) -> dict[str, Any]:
    """Return the `kv_transfer_params` that make vLLM pull `offer`, with the first token or not."""
    return {_CONSUME: True, "offer": asdict(offer), "awaits_token": awaits_token}


def handoff_to_produce(params: Mapping[str, Any] | None) -> HandoffId | None:
    """Return the hand-off a request is to be held under, None if it is not."""
    return HandoffId(params["handoff_id"]) if params and params.get(_PRODUCE) else None


def offer_to_consume(params: Mapping[str, Any] | None) -> Offer | None:
    """Return the offer a request is to pull, None if it prefills by itself."""
    return _offer(params["offer"]) if params and params.get(_CONSUME) else None


def awaits_token(params: Mapping[str, Any] | None) -> bool:
    """Return whether a consuming request goes on from a token that comes with its offer."""
    return bool(params and params.get("awaits_token"))


def offered_params(offer: Offer) -> dict[str, Any]:
    """Return what vLLM attaches to a producing request's last output."""
    return {"offer": asdict(offer)}


def offered(params: Mapping[str, Any] | None) -> Offer | None:
    """Return the offer attached to a producing request's last output."""
    return _offer(params["offer"]) if params and "offer" in params else None


def _offer(document: Mapping[str, Any]) -> Offer:
    return Offer(
        **{
            **document,
            "handoff_id": HandoffId(document["handoff_id"]),
            "worker_id": WorkerId(document["worker_id"]),
            "endpoints": tuple(document["endpoints"]),
        }
    )
