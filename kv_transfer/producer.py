"""The producer's side: which KV caches are held, who may read them, when blocks are free.

Single-threaded: `port.HandoffPort` calls it from its one thread with the time of the call.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from cluster.names import HandoffId
from cluster.stages import StageClock
from kv_transfer.blocks import BlockStore
from kv_transfer.handoff import ProducerEvent, ProducerHandoff
from kv_transfer.leases import LeaseTable
from kv_transfer.parcels import Parcels
from kv_transfer.protocol import (
    Blocks,
    ConsumerMessage,
    Greet,
    ProducerMessage,
    ReadBlocks,
    Refusal,
    Refused,
    Release,
    Renew,
    Via,
    Welcome,
)
from kv_transfer.transport import Stage

if TYPE_CHECKING:
    import zmq

# A read can overtake the engine step that tells us of the hold, by as long as a step takes. It
# waits for it, less long than the reader does before it calls the pull stalled.
UNKNOWN_GRACE_S = 2.5
# A read waits this long for room where its consumer likes it best, then goes any other way.
ROOM_GRACE_S = 0.05
# Hand-offs remembered after their end, so that a late read is refused without that wait.
_ENDED_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Hold:
    """Blocks of one finished prompt, by group and position; `key` is the engine's request."""

    handoff_id: HandoffId
    key: str
    block_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A message for one peer, with its payload frame if it has one."""

    peer: bytes
    message: ProducerMessage
    frame: "zmq.Frame | None" = None


@dataclass(frozen=True, slots=True)
class _Held:
    hold: Hold
    handoff: ProducerHandoff
    produced_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Parked:
    peer: bytes
    read: ReadBlocks
    since: float


class Producer:
    """Holds, serves, refuses and frees; `freed` collects the keys whose blocks may go.

    `counts` says how often each thing happened, refusals by cause, and how long copies took.

    `catch_up` lets the owner apply ends that arrived while blocks were being gathered: only
    what is still readable after it is sent.
    """

    def __init__(
        self,
        store: BlockStore,
        epoch: int,
        lease_s: float,
        is_checksummed: bool,
        catch_up: Callable[[], None],
        parcels: Parcels,
    ) -> None:
        self.freed: list[str] = []
        self.counts: Counter[str] = Counter()
        self._gathering = StageClock(self.counts, "gather")
        self._store = store
        self._epoch = epoch
        self._fingerprint = store.layout.fingerprint
        self._is_checksummed = is_checksummed
        self._catch_up = catch_up
        self._parcels = parcels
        self._held: dict[HandoffId, _Held] = {}
        self._leases = LeaseTable(lease_s)
        self._parked: list[_Parked] = []
        self._ended: dict[HandoffId, None] = {}

    def __repr__(self) -> str:
        state = f"held={len(self._held)} parked={len(self._parked)} out={len(self._parcels)}"
        return f"<Producer {state}>"

    def hold(self, hold: Hold, now: float) -> None:
        """Take blocks into custody; reads that came before are answered by the next `tick`.

        Answering them here would nest: `catch_up` may run many holds during one gather.
        """
        if hold.handoff_id in self._held:
            # Two prompts under one name: a read could get the other's blocks, so neither is held.
            self.counts["handoffs_duplicate"] += 1
            self.end(hold.handoff_id, ProducerEvent.ABORTED)
            self.freed.append(hold.key)
            return
        self._held[hold.handoff_id] = _Held(hold, ProducerHandoff())
        self._leases.touch(hold.handoff_id, now)

    def end(self, handoff_id: HandoffId, event: ProducerEvent) -> None:
        """End a hand-off; one that is already over or unknown is left alone."""
        held = self._held.get(handoff_id)
        if held is not None and held.handoff.is_readable:
            self._leases.end(handoff_id)
            self.counts[f"handoffs_{event.name.lower()}"] += 1
            self._advance(handoff_id, event)

    def handle(self, peer: bytes, message: ConsumerMessage, now: float) -> Iterable[Answer]:
        """Act on one message; nothing a peer sends raises."""
        if isinstance(message, ReadBlocks):
            is_known = message.handoff_id in self._held or message.handoff_id in self._ended
            if message.epoch == self._epoch:
                self._parcels.take_back(message.handoff_id, message.taken)
            if not is_known and message.epoch == self._epoch:
                self._parked.append(_Parked(peer, message, now))
                return
            yield from self._serve(_Parked(peer, message, now), now)
        elif isinstance(message, Greet):
            yield Answer(peer, Welcome(self._epoch, self._parcels.places(message.vias)))
        elif message.epoch != self._epoch:
            self.counts[f"refused_{Refusal.STALE_EPOCH.value}"] += 1
        elif isinstance(message, Renew):
            self._parcels.take_back(message.handoff_id, message.taken)
            if message.handoff_id in self._held:
                self._leases.touch(message.handoff_id, now)
        elif isinstance(message, Release):
            self.end(message.handoff_id, ProducerEvent.RELEASED)

    def tick(self, now: float) -> Iterable[Answer]:
        """Expire leases and parcels; answer reads whose hold or room has come, give up on those
        whose hold never did."""
        for handoff_id in self._leases.take_expired(now):
            self.end(handoff_id, ProducerEvent.EXPIRED)
        if overdue := self._parcels.expire(now):
            self.counts["parcels_overdue"] += overdue
        parked, self._parked = self._parked, []
        for entry in parked:
            if entry.read.handoff_id in self._held or entry.read.handoff_id in self._ended:
                yield from self._serve(entry, now)
            elif now - entry.since >= UNKNOWN_GRACE_S:
                yield self._refuse(entry.peer, entry.read, Refusal.UNKNOWN, "no such hand-off")
            else:
                self._parked.append(entry)

    def _serve(self, entry: _Parked, now: float) -> Iterable[Answer]:
        """Answer a read, or park it until there is room for the answer."""
        peer, read = entry.peer, entry.read
        refusal = self._objection(read)
        if refusal is not None:
            yield self._refuse(peer, read, *refusal)
            return
        self._leases.touch(read.handoff_id, now)
        num_bytes = read.num_blocks * self._store.layout.groups[read.group].block_bytes
        vias = self._parcels.usable(read.vias, num_bytes)
        if not vias:
            yield self._refuse(peer, read, Refusal.TRANSPORT, f"no way for {num_bytes} bytes")
            return
        if now - entry.since < ROOM_GRACE_S:
            vias = vias[:1]
        staged = self._parcels.stage(vias, num_bytes, read.handoff_id, now)
        if staged is None:
            self._parked.append(entry)
        else:
            yield self._gather(peer, read, *staged)

    def _gather(self, peer: bytes, read: ReadBlocks, via: Via, stage: Stage) -> Answer:
        """Copy the blocks out; announce them only if they are still the hand-off's."""
        held = self._held[read.handoff_id]
        positions = slice(read.first_block, read.first_block + read.num_blocks)
        self._advance(read.handoff_id, ProducerEvent.READ_STARTED)
        try:
            block_ids = held.hold.block_ids[read.group][positions]
            began_s = time.perf_counter()
            self._store.gather(read.group, block_ids, stage.buffer)
            self._gathering.add(time.perf_counter() - began_s)
            # Preemption or an abort may have taken the blocks while they were copied; bytes of a
            # reused block have a valid checksum, so ownership is checked again before sending.
            self._catch_up()
            is_still_ours = self._held[read.handoff_id].handoff.is_readable
            answer = self._blocks(peer, read, via, stage) if is_still_ours else None
        finally:
            self._advance(read.handoff_id, ProducerEvent.READ_ENDED)
        return answer or self._refuse(peer, read, Refusal.ENDED, "ended while being read")

    def _objection(self, read: ReadBlocks) -> tuple[Refusal, str] | None:
        if read.epoch != self._epoch:
            return Refusal.STALE_EPOCH, f"this engine's epoch is {self._epoch}"
        if read.fingerprint != self._fingerprint:
            return Refusal.LAYOUT, f"this engine's layout is {self._fingerprint}"
        held = self._held.get(read.handoff_id)
        if held is None or not held.handoff.is_readable:
            return Refusal.ENDED, "released, expired or never held"
        groups = held.hold.block_ids
        if not 0 <= read.group < len(groups):
            return Refusal.RANGE, f"group {read.group} of {len(groups)}"
        ids = groups[read.group]
        end = read.first_block + read.num_blocks
        if not (0 <= read.first_block < end <= len(ids)):
            return Refusal.RANGE, f"blocks {read.first_block}..{end} of {len(ids)}"
        if 0 in ids[read.first_block : end]:
            return Refusal.RANGE, "a block outside the attention window is not held"
        return None

    def _blocks(self, peer: bytes, read: ReadBlocks, via: Via, stage: Stage) -> Answer:
        held = self._held[read.handoff_id]
        num_bytes = stage.buffer.nbytes
        produced = held.produced_bytes + num_bytes
        self.counts["bytes_sent"] += num_bytes
        self._held[read.handoff_id] = replace(held, produced_bytes=produced)
        checksum = xxhash.xxh3_64_intdigest(stage.buffer) if self._is_checksummed else None
        message = Blocks(
            read.handoff_id,
            read.group,
            read.first_block,
            read.num_blocks,
            num_bytes,
            checksum,
            produced,
            via,
            stage.parcel,
        )
        return Answer(peer, message, stage.frame)

    def _refuse(self, peer: bytes, read: ReadBlocks, cause: Refusal, detail: str) -> Answer:
        self.counts[f"refused_{cause.value}"] += 1
        return Answer(peer, Refused(read.handoff_id, cause, detail))

    def _advance(self, handoff_id: HandoffId, event: ProducerEvent) -> None:
        held = self._held[handoff_id]
        handoff = held.handoff.advance(event)
        self._held[handoff_id] = replace(held, handoff=handoff)
        if handoff.is_over:
            self._parcels.end(handoff_id)
            self.freed.append(held.hold.key)
            del self._held[handoff_id]
            self._ended[handoff_id] = None
            if len(self._ended) > _ENDED_KEPT:
                del self._ended[next(iter(self._ended))]
