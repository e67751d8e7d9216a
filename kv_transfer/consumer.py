"""The consumer's side: pulls in flight, what arrived intact, and when to give up.

Single-threaded: `port.HandoffPort` calls it from its one thread with the time of the call.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.engine import EndedPull
from cluster.messages import Offer, Receipt
from cluster.names import HandoffId
from cluster.sockets import plain_address
from cluster.stages import StageClock
from kv_transfer.blocks import BlockStore, Content, host_bytes
from kv_transfer.handoff import ConsumerHandoff, ConsumerState
from kv_transfer.layout import GroupLayout, Read, plan_reads
from kv_transfer.protocol import (
    Blocks,
    ConsumerMessage,
    Filling,
    ReadBlocks,
    Refused,
    Release,
    Renew,
    Via,
)
from kv_transfer.transport import Payload

if TYPE_CHECKING:
    from kv_transfer.recut import Recut

# Of one read where nothing is copied out for it: beyond that its message costs nothing.
_IN_PLACE_BYTES = 32 << 20

Damage = Callable[[Read, Content], Content]


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch `offer` into local blocks, by group and position, from `first_blocks` on.

    With `awaits_token` it is loaded only with the first token, which comes with the last blocks.
    """

    key: str
    offer: Offer
    block_ids: tuple[tuple[int, ...], ...]
    first_blocks: tuple[int, ...]
    awaits_token: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """A message for the producer at `endpoint`."""

    endpoint: str
    message: ConsumerMessage


@dataclass(frozen=True, slots=True)
class _Active:
    pull: Pull
    handoff: ConsumerHandoff
    started: float
    progressed: float
    heard: float
    # Set if the producer's blocks are larger or smaller than ours; reads are of its blocks.
    recut: "Recut | None" = None
    # Since when the whole prompt has been there to be read, by our clock.
    complete: float | None = None
    first_token: int | None = None
    num_blocks: int = 0
    received_bytes: int = 0
    produced_bytes: int = 0
    vias: frozenset[Via] = frozenset()
    taken: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Announced:
    offer: Offer
    since: float
    renewed: float


class Consumer:
    """Starts, feeds and ends pulls; `results` collects one result per pull, always.

    `rank` picks the producer's endpoint: ranks of one tensor-parallel degree pair off.
    `damage`, of tests, sees every chunk asked for before it is checked. `step_tokens` is how much
    of a prompt producers compute at a time.
    """

    def __init__(
        self,
        store: BlockStore,
        rank: int,
        chunk_bytes: int,
        window: int,
        stall_timeout_s: float,
        renew_s: float,
        is_checksummed: bool,
        damage: Damage | None = None,
        step_tokens: int | None = None,
    ) -> None:
        self.results: list[EndedPull] = []
        self.counts: Counter[str] = Counter()
        self._waiting = StageClock(self.counts, "wait")
        self._pulling = StageClock(self.counts, "pull")
        self._verifying = StageClock(self.counts, "verify")
        self._scattering = StageClock(self.counts, "scatter")
        self._store = store
        self._rank = rank
        self._chunk_bytes = chunk_bytes
        self._window = window
        self._stall_timeout_s = stall_timeout_s
        self._renew_s = renew_s
        self._is_checksummed = is_checksummed
        self._damage_received = damage
        self._step_tokens = step_tokens
        self._fresh = bytearray()
        self._active: dict[HandoffId, _Active] = {}
        self._by_key: dict[str, HandoffId] = {}
        self._announced: dict[HandoffId, _Announced] = {}

    def __repr__(self) -> str:
        return f"<Consumer pulling={len(self._active)} announced={len(self._announced)}>"

    def announce(self, offer: Offer, now: float) -> None:
        """Keep the producer's lease alive until the pull can start."""
        if self._has_endpoint(offer):
            self._announced[offer.handoff_id] = _Announced(offer, now, now)

    def give_up(self, offer: Offer) -> Iterable[Order]:
        """An announced offer will not be pulled: let the producer free its blocks."""
        self._announced.pop(offer.handoff_id, None)
        if offer.handoff_id not in self._active and self._has_endpoint(offer):
            yield self._order(offer, Release(offer.handoff_id, offer.epoch, is_loaded=False))

    def start(self, pull: Pull, now: float) -> Iterable[Order]:
        """Begin a pull; an offer this engine cannot read fails at once."""
        offer = pull.offer
        announced = self._announced.pop(offer.handoff_id, None)
        if announced is not None:
            self._waiting.add(now - announced.since)
        if offer.handoff_id in self._active:
            self._report(pull, "this hand-off is being pulled already", Receipt(0, 0, 0, 0.0))
            return
        mismatch = self._mismatch(offer)
        recut = self._recut(pull) if mismatch is None else None
        reads = self._plan(pull, recut) if mismatch is None else []
        handoff = ConsumerHandoff(tuple(reads), self._window)
        active = _Active(pull, handoff, now, now, now, recut)
        self._active[offer.handoff_id] = active
        self._by_key[pull.key] = offer.handoff_id
        if mismatch is not None:
            yield from self._fail(active, mismatch)
            return
        handoff, asks = active.handoff.start()
        yield from self._proceed(replace(active, handoff=handoff), asks)

    def _recut(self, pull: Pull) -> "Recut | None":
        """Return how to cut a producer's blocks into ours, None if they are the same."""
        ours = self._store.layout.groups[0]
        size = pull.offer.block_size
        if size is None or size == ours.block_size:
            return None
        # The simulated engine has no such blocks, and no numpy.
        from kv_transfer.recut import Recut

        theirs = GroupLayout.of_tokens(size, ours.shapes)
        return Recut(theirs, ours, pull.first_blocks[0], len(pull.block_ids[0]))

    def _plan(self, pull: Pull, recut: "Recut | None") -> Sequence[Read]:
        if recut is not None:
            num_tokens = pull.offer.num_tokens
            return recut.reads(num_tokens, self._chunk_bytes, self._step_tokens)
        return plan_reads(
            self._store.layout,
            pull.block_ids,
            pull.first_blocks,
            self._chunk_bytes,
            self._step_tokens,
        )

    def cancel(self, key: str) -> Iterable[Order]:
        """Stop a pull; its result still comes, so that its blocks can be freed."""
        handoff_id = self._by_key.get(key)
        if handoff_id is not None:
            yield from self._fail(self._active[handoff_id], "cancelled")

    def handle(
        self, message: Blocks | Filling | Refused, payload: Payload | None, now: float
    ) -> Iterable[Order]:
        """Act on one message; late or foreign ones are counted and dropped.

        `payload` is the parcel of a `Blocks`, None if it was not there.
        """
        active = self._active.get(message.handoff_id)
        if isinstance(message, Filling):
            if active is not None:
                self._active[message.handoff_id] = replace(active, heard=now)
        elif active is None:
            self.counts["chunks_late"] += 1
        elif isinstance(message, Refused):
            yield from self._fail(active, f"refused: {message.cause.value}: {message.detail}")
        else:
            yield from self._accept(active, message, payload, now)

    def excuse(self, now: float) -> None:
        """This process stood still: what has been said meanwhile has not been read yet."""
        for handoff_id, active in self._active.items():
            self._active[handoff_id] = replace(active, heard=now)

    def tick(self, now: float) -> Iterable[Order]:
        """Fail pulls that stall; renew leases of what waits for local blocks."""
        for active in list(self._active.values()):
            if now - active.heard >= self._stall_timeout_s:
                waited = f"no data for {self._stall_timeout_s:.1f} s"
                address = plain_address(self._endpoint(active.pull.offer))
                yield from self._fail(active, f"{waited} from {address}")
        for handoff_id, announced in list(self._announced.items()):
            if now - announced.renewed >= self._renew_s:
                self._announced[handoff_id] = replace(announced, renewed=now)
                yield self._order(announced.offer, Renew(handoff_id, announced.offer.epoch))

    def _accept(
        self, active: _Active, message: Blocks, payload: Payload | None, now: float
    ) -> Iterable[Order]:
        read = Read(message.group, message.first_block, message.num_blocks)
        if read not in active.handoff.asked:
            self.counts["chunks_foreign"] += 1
            return
        content = None if payload is None else payload.content
        if self._damage_received is not None and content is not None:
            content = self._damage_received(read, content)
        began_s = time.perf_counter()
        damage = self._damage(active, read, message, content)
        verified_s = time.perf_counter()
        self._verifying.add(verified_s - began_s)
        if payload is None or content is None or damage:
            self.counts["chunks_damaged"] += 1
            yield from self._fail(active, damage or "no payload")
            return
        try:
            self._scatter(active, read, content)
        except OSError as error:
            self.counts["chunks_damaged"] += 1
            yield from self._fail(active, f"blocks could not be read: {error}")
            return
        self._scattering.add(time.perf_counter() - verified_s)
        if not payload.is_intact():
            self.counts["chunks_overtaken"] += 1
            yield from self._fail(active, "the producer took its memory back during a read")
            return
        self.counts["bytes_received"] += content.nbytes
        self.counts[f"via_{message.via.value}"] += content.nbytes
        handoff = active.handoff
        if message.via.is_in_place:
            # All of it is there, and no memory is between: messages are what a chunk costs.
            handoff = handoff.merge(max(1, _IN_PLACE_BYTES // self._block_bytes(active, read)))
        handoff, asks = handoff.receive(read)
        arrived = replace(
            active,
            handoff=handoff,
            progressed=now,
            heard=now,
            complete=active.complete if message.held_s is None else now - message.held_s,
            first_token=active.first_token if message.held_s is None else message.first_token,
            num_blocks=active.num_blocks + read.num_blocks,
            received_bytes=active.received_bytes + content.nbytes,
            # Chunks of several connections overtake each other; the count only grows.
            produced_bytes=max(active.produced_bytes, message.produced_bytes),
            vias=active.vias | {message.via},
            taken=(*active.taken, message.parcel) if message.parcel else active.taken,
        )
        yield from self._proceed(arrived, asks)

    def _scatter(self, active: _Active, read: Read, content: Content) -> None:
        positions = slice(read.first_block, read.first_block + read.num_blocks)
        if active.recut is not None:
            positions = active.recut.place(read)
            content = self._cut(active.recut, read, host_bytes(content))
        self._store.scatter(read.group, active.pull.block_ids[read.group][positions], content)

    def _cut(self, recut: "Recut", read: Read, content: memoryview) -> memoryview:
        """Return a chunk as blocks of ours, until the next one is cut."""
        num_bytes = recut.num_bytes(read)
        if len(self._fresh) < num_bytes:
            self._fresh = bytearray(num_bytes)
        fresh = memoryview(self._fresh)[:num_bytes]
        recut.cut(read, content, fresh)
        return fresh

    def _block_bytes(self, active: _Active, read: Read) -> int:
        """Return what a block of a read has on its way: its producer's may be larger or smaller."""
        theirs = active.recut.theirs if active.recut else self._store.layout.groups[read.group]
        return theirs.block_bytes

    def _damage(
        self, active: _Active, read: Read, message: Blocks, payload: "Content | None"
    ) -> str | None:
        wanted = self._block_bytes(active, read) * read.num_blocks
        found = 0 if payload is None else payload.nbytes
        if payload is None or found != wanted or message.payload_bytes != wanted:
            return f"payload of {found} bytes, wanted {wanted}"
        if message.held_s is not None and not 0 <= message.held_s < math.inf:
            return f"held for {message.held_s} s"
        if not self._is_checksummed or message.via.is_in_place:
            return None
        if message.checksum is None:
            return f"no checksum with blocks {read.first_block}+{read.num_blocks}"
        if self._store.checksum(payload) != message.checksum:
            return f"checksum mismatch in blocks {read.first_block}+{read.num_blocks}"
        return None

    def _mismatch(self, offer: Offer) -> str | None:
        mine = self._store.layout.fingerprint
        if offer.fingerprint != mine:
            return f"layout {offer.fingerprint} of {offer.worker_id} is not this engine's {mine}"
        if offer.block_size is not None and not self._store.layout.reads(offer.block_size):
            return f"blocks of {offer.block_size} tokens of {offer.worker_id} cannot be cut"
        if not self._has_endpoint(offer):
            return f"{offer.worker_id} has {len(offer.endpoints)} ranks, this is {self._rank}"
        return None

    def _proceed(self, active: _Active, asks: tuple[Read, ...]) -> Iterable[Order]:
        offer, taken = active.pull.offer, active.taken
        self._active[offer.handoff_id] = replace(active, taken=())
        for read in asks:
            ask = ReadBlocks(
                offer.handoff_id,
                offer.epoch,
                offer.fingerprint,
                read.group,
                read.first_block,
                read.num_blocks,
                taken=taken,
            )
            taken = ()
            yield self._order(offer, ask)
        # Reads on their way may be waiting for just this room; the release returns the rest.
        if taken and active.handoff.asked:
            yield self._order(offer, Renew(offer.handoff_id, offer.epoch, taken))
        if active.handoff.state is not ConsumerState.LOADED:
            return
        if active.pull.awaits_token and active.first_token is None:
            # It would be decoded from the wrong place.
            yield from self._end(active, "the producer sent no first token")
        else:
            yield from self._end(active)

    def _fail(self, active: _Active, reason: str) -> Iterable[Order]:
        yield from self._end(replace(active, handoff=active.handoff.fail(reason)), reason)

    def _end(self, active: _Active, failure: str | None = None) -> Iterable[Order]:
        offer = active.pull.offer
        del self._active[offer.handoff_id]
        del self._by_key[active.pull.key]
        # What was read while the prompt was computed has kept nobody waiting.
        transfer_s = active.progressed - max(active.started, active.complete or active.started)
        receipt = Receipt(
            active.num_blocks,
            active.received_bytes,
            active.produced_bytes,
            transfer_s,
            "+".join(sorted(active.vias)),
        )
        if failure is None:
            self._pulling.add(transfer_s)
        self._report(active.pull, failure, receipt, active.first_token)
        if self._has_endpoint(offer):
            yield self._order(offer, Release(offer.handoff_id, offer.epoch, failure is None))

    def _report(
        self, pull: Pull, failure: str | None, receipt: Receipt, first_token: int | None = None
    ) -> None:
        self.counts["pulls_loaded" if failure is None else "pulls_failed"] += 1
        token = first_token if pull.awaits_token else None
        self.results.append(EndedPull(pull.key, failure, receipt, token))

    def _has_endpoint(self, offer: Offer) -> bool:
        """Whether the offer names a port for this rank; offers come from the wire."""
        return self._rank < len(offer.endpoints)

    def _endpoint(self, offer: Offer) -> str:
        return offer.endpoints[self._rank]

    def _order(self, offer: Offer, message: ConsumerMessage) -> Order:
        return Order(self._endpoint(offer), message)
