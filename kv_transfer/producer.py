"""The producer's side: which KV caches are held, who may read them, when blocks are free.

Single-threaded: `port.HandoffPort` calls it from its one thread with the time of the call.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.names import HandoffId
from cluster.stages import StageClock
from kv_transfer.blocks import BlockStore
from kv_transfer.handoff import ProducerEvent, ProducerHandoff, ProducerState
from kv_transfer.leases import LeaseTable
from kv_transfer.parcels import Parcels
from kv_transfer.progress import Growth
from kv_transfer.protocol import (
    Blocks,
    ConsumerMessage,
    Filling,
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
# How often a consumer whose reads wait for the engine hears that they do, before it calls them
# stalled.
_FILLING_S = 0.3
# Hand-offs remembered after their end, so that a late read is refused without that wait.
_ENDED_KEPT = 4096
# Reads that wait, of all consumers: each has a few of them on the way per pull.
_MAX_PARKED = 1024


@dataclass(frozen=True, slots=True)
class Hold:
    """Blocks of one finished prompt, by group and position, and the first token that was sampled
    from it, if it is the client's; `key` is the engine's request."""

    handoff_id: HandoffId
    key: str
    block_ids: tuple[tuple[int, ...], ...]
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A message for one peer, with its payload frame if it has one."""

    peer: bytes
    message: ProducerMessage
    frame: "zmq.Frame | None" = None


@dataclass(frozen=True, slots=True)
class _Held:
    """`hold` has the blocks finished so far; `held_since` is None while there are more to come."""

    hold: Hold
    handoff: ProducerHandoff
    held_since: float | None = None
    is_released: bool = False
    produced_bytes: int = 0


# Who asks for which blocks: the peer, the hand-off, the group and the position of the first.
_Asked = tuple[bytes, HandoffId, int, int]


@dataclass(frozen=True, slots=True)
class _Parked:
    peer: bytes
    read: ReadBlocks
    since: float

    @property
    def asked(self) -> _Asked:
        return self.peer, self.read.handoff_id, self.read.group, self.read.first_block


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
        self._parked: dict[_Asked, _Parked] = {}
        self._told_s: dict[HandoffId, float] = {}
        self._ended: dict[HandoffId, None] = {}

    def __repr__(self) -> str:
        state = f"held={len(self._held)} parked={len(self._parked)} out={len(self._parcels)}"
        return f"<Producer {state}>"

    def open(self, handoff_id: HandoffId, key: str, num_groups: int) -> None:
        """Let blocks of a prompt be read as they are finished. Only the engine can end this, by
        `hold` or `abandon`."""
        if handoff_id in self._held:
            # Its own end says so.
            return
        hold = Hold(handoff_id, key, ((),) * num_groups)
        self._held[handoff_id] = _Held(hold, ProducerHandoff(ProducerState.FILLING))

    def grow(self, growth: Growth) -> None:
        """Take in the blocks that a step has finished; the next `tick` answers their reads."""
        held = self._held.get(growth.handoff_id)
        if held is not None and held.handoff.is_filling:
            pairs = zip(held.hold.block_ids, growth.block_ids, strict=True)
            hold = replace(held.hold, block_ids=tuple(old + new for old, new in pairs))
            self._held[growth.handoff_id] = replace(held, hold=hold)

    def revoke(self, handoff_id: HandoffId) -> None:
        """The engine has taken an open prompt's blocks back, and will compute it once more."""
        held = self._held.get(handoff_id)
        if held is not None and held.handoff.is_filling:
            hold = replace(held.hold, block_ids=((),) * len(held.hold.block_ids))
            self._held[handoff_id] = replace(held, hold=hold)
            self._advance(handoff_id, ProducerEvent.REVOKED)

    def hold(self, hold: Hold, now: float) -> None:
        """Take blocks into custody; reads that came before are answered by the next `tick`.

        Answering them here would nest: `catch_up` may run many holds during one gather.
        """
        held = self._held.get(hold.handoff_id)
        if held is not None and held.handoff.is_filling and held.hold.key == hold.key:
            self._held[hold.handoff_id] = replace(held, hold=hold, held_since=now)
            self._advance(hold.handoff_id, ProducerEvent.COMPLETED)
            self._leases.touch(hold.handoff_id, now)
            if held.is_released:
                self.end(hold.handoff_id, ProducerEvent.RELEASED)
            return
        if held is not None and held.handoff.is_filling:
            # Its engine still has the other one's blocks.
            self.counts["handoffs_duplicate"] += 1
            self.freed.append(hold.key)
            return
        if held is not None:
            # Two prompts under one name: a read could get the other's blocks, so neither is held.
            self.counts["handoffs_duplicate"] += 1
            self.end(hold.handoff_id, ProducerEvent.ABORTED)
            self.freed.append(hold.key)
            return
        self._held[hold.handoff_id] = _Held(hold, ProducerHandoff(), held_since=now)
        self._leases.touch(hold.handoff_id, now)

    def end(self, handoff_id: HandoffId, event: ProducerEvent) -> None:
        """End a hand-off; one that is already over or unknown is left alone.

        While its prompt is computed its end waits for the engine, which has the blocks.
        """
        held = self._held.get(handoff_id)
        if held is None or not held.handoff.is_readable:
            return
        if held.handoff.is_filling:
            self._held[handoff_id] = replace(held, is_released=True)
            kept = self._parked.items()
            self._parked = {asked: one for asked, one in kept if one.read.handoff_id != handoff_id}
        else:
            self._leases.end(handoff_id)
            self.counts[f"handoffs_{event.name.lower()}"] += 1
            self._advance(handoff_id, event)

    def abandon(self, handoff_id: HandoffId, key: str) -> None:
        """The engine gives an open prompt up; its key is in `freed` when nobody reads it."""
        held = self._held.get(handoff_id)
        if held is not None and held.handoff.is_filling and held.hold.key == key:
            self.counts["handoffs_aborted"] += 1
            self._advance(handoff_id, ProducerEvent.ABORTED)
        else:
            # Another prompt has the name: this one was never read.
            self.counts["handoffs_duplicate"] += 1
            self.freed.append(key)

    def handle(self, peer: bytes, message: ConsumerMessage, now: float) -> Iterable[Answer]:
        """Act on one message; nothing a peer sends raises."""
        if isinstance(message, ReadBlocks):
            is_known = message.handoff_id in self._held or message.handoff_id in self._ended
            if message.epoch == self._epoch:
                self._parcels.take_back(message.handoff_id, message.taken)
            if not is_known and message.epoch == self._epoch:
                yield from self._park(_Parked(peer, message, now))
                return
            yield from self._serve(_Parked(peer, message, now), now)
        elif isinstance(message, Greet):
            yield Answer(peer, Welcome(self._epoch, self._parcels.places(message.vias)))
        elif message.epoch != self._epoch:
            self.counts[f"refused_{Refusal.STALE_EPOCH.value}"] += 1
        elif isinstance(message, Renew):
            self._parcels.take_back(message.handoff_id, message.taken)
            self._renew(message.handoff_id, now)
        elif isinstance(message, Release):
            self.end(message.handoff_id, ProducerEvent.RELEASED)

    def tick(self, now: float) -> Iterable[Answer]:
        """Expire leases and parcels; answer reads whose hold or room has come, give up on those
        whose hold never did."""
        for handoff_id in self._leases.take_expired(now):
            self.end(handoff_id, ProducerEvent.EXPIRED)
        if overdue := self._parcels.expire(now):
            self.counts["parcels_overdue"] += overdue
        for entry in list(self._parked.values()):
            # An end that a gather has just caught up with takes its reads along.
            if self._parked.get(entry.asked) is not entry:
                continue
            if entry.read.handoff_id in self._held or entry.read.handoff_id in self._ended:
                del self._parked[entry.asked]
                yield from self._serve(entry, now)
            elif now - entry.since >= UNKNOWN_GRACE_S:
                del self._parked[entry.asked]
                yield self._refuse(entry.peer, entry.read, Refusal.UNKNOWN, "no such hand-off")

    def _park(self, entry: _Parked) -> Iterable[Answer]:
        """Keep a read until it can be answered; one that is asked again takes its own place."""
        if entry.asked not in self._parked and len(self._parked) >= _MAX_PARKED:
            waiting = f"{_MAX_PARKED} reads are waiting already"
            yield self._refuse(entry.peer, entry.read, Refusal.CROWDED, waiting)
        else:
            self._parked[entry.asked] = entry

    def _serve(self, entry: _Parked, now: float) -> Iterable[Answer]:
        """Answer a read, or park it until there is room for the answer."""
        peer, read = entry.peer, entry.read
        if self._is_early(read):
            yield from self._put_off(entry, now)
            return
        refusal = self._objection(read)
        if refusal is not None:
            yield self._refuse(peer, read, *refusal)
            return
        if entry.since == now:
            # Not of one that waits: its reader may be dead.
            self._renew(read.handoff_id, now)
        num_bytes = self._num_bytes(read)
        is_held = not self._held[read.handoff_id].handoff.is_filling
        ways = self._parcels.usable(read.ways, num_bytes, is_held)
        if not ways:
            yield self._refuse(peer, read, Refusal.TRANSPORT, f"no way for {num_bytes} bytes")
            return
        if now - entry.since < ROOM_GRACE_S:
            ways = ways[:1]
        try:
            staged = self._parcels.stage(ways, num_bytes, read.handoff_id, now)
            answer = self._gather(peer, read, now, *staged) if staged is not None else None
        except (MemoryError, OSError, RuntimeError) as error:
            # No memory, on the host or the GPU, or no thread more: this read's, and no other's.
            self.counts["reads_broken"] += 1
            why = f"blocks could not be copied out: {error!r}"
            answer = self._refuse(peer, read, Refusal.TRANSPORT, why)
        if answer is None:
            yield from self._park(entry)
        else:
            yield answer

    def _is_early(self, read: ReadBlocks) -> bool:
        """Whether some of the blocks may still be computed."""
        held = self._held.get(read.handoff_id)
        if held is None or not held.handoff.is_filling or read.epoch != self._epoch:
            return False
        groups = held.hold.block_ids
        in_range = 0 <= read.group < len(groups) and read.first_block >= 0 < read.num_blocks
        return in_range and read.first_block + read.num_blocks > len(groups[read.group])

    def _put_off(self, entry: _Parked, now: float) -> Iterable[Answer]:
        """Keep a read until its blocks are finished, and its reader from giving up meanwhile."""
        yield from self._park(replace(entry, since=now))
        handoff_id = entry.read.handoff_id
        if now - self._told_s.get(handoff_id, -_FILLING_S) >= _FILLING_S:
            self._told_s[handoff_id] = now
            yield Answer(entry.peer, Filling(handoff_id))

    def _renew(self, handoff_id: HandoffId, now: float) -> None:
        """Restart a lease; there is none while the engine has the blocks anyway."""
        held = self._held.get(handoff_id)
        if held is not None and held.handoff.is_readable and not held.handoff.is_filling:
            self._leases.touch(handoff_id, now)

    def _gather(
        self, peer: bytes, read: ReadBlocks, now: float, via: Via, stage: Stage
    ) -> Answer | None:
        """Copy the blocks out; announce them only if they are still the hand-off's.

        None if the engine has taken them back meanwhile: it will compute them once more.
        """
        held = self._held[read.handoff_id]
        positions = slice(read.first_block, read.first_block + read.num_blocks)
        block_ids = held.hold.block_ids[read.group][positions]
        if via.is_in_place:
            return self._blocks(peer, read, via, stage, now, block_ids)
        self._advance(read.handoff_id, ProducerEvent.READ_STARTED)
        try:
            began_s = time.perf_counter()
            self._store.gather(read.group, block_ids, stage.buffer)
            self._gathering.add(time.perf_counter() - began_s)
            # Preemption or an abort may have taken the blocks while they were copied; bytes of a
            # reused block have a valid checksum, so ownership is checked again before sending.
            self._catch_up()
            current = self._held[read.handoff_id]
            if not current.handoff.is_readable:
                return self._refuse(peer, read, Refusal.ENDED, "ended while being read")
            is_revoked = current.handoff.revision != held.handoff.revision
            # The end of a prompt gives up what its attention window has left behind.
            if is_revoked or current.hold.block_ids[read.group][positions] != block_ids:
                self.counts["reads_revoked"] += 1
                self._parcels.take_back(read.handoff_id, (stage.parcel,))
                return None
            return self._blocks(peer, read, via, stage, now)
        finally:
            self._advance(read.handoff_id, ProducerEvent.READ_ENDED)

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

    def _num_bytes(self, read: ReadBlocks) -> int:
        return read.num_blocks * self._store.layout.groups[read.group].block_bytes

    def _blocks(
        self,
        peer: bytes,
        read: ReadBlocks,
        via: Via,
        stage: Stage,
        now: float,
        block_ids: tuple[int, ...] = (),
    ) -> Answer:
        """Announce what was copied out, or, by their ids, blocks to be read where they are."""
        held = self._held[read.handoff_id]
        num_bytes = self._num_bytes(read)
        produced = held.produced_bytes + num_bytes
        self.counts["bytes_sent"] += num_bytes
        self._held[read.handoff_id] = replace(held, produced_bytes=produced)
        is_checksummed = self._is_checksummed and not via.is_in_place
        checksum = self._store.checksum(stage.buffer) if is_checksummed else None
        stage.send()
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
            # A hold may have come while its blocks were gathered.
            None if held.held_since is None else max(0.0, now - held.held_since),
            held.hold.first_token,
            block_ids,
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
            self._told_s.pop(handoff_id, None)
            self._parcels.end(handoff_id)
            self.freed.append(held.hold.key)
            del self._held[handoff_id]
            self._ended[handoff_id] = None
            if len(self._ended) > _ENDED_KEPT:
                del self._ended[next(iter(self._ended))]
