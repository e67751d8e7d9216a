"""The life of a hand-off on either side, as two tables. No I/O, no clock, no engine.

Producer: FILLING while the prompt is computed, FEEDING while blocks of it that are finished are
sent; complete it is HELD -> SENDING -> RELEASED, or EXPIRED, or ABORTED. Blocks are freed once,
when a hand-off has ended *and* no send is reading them: an end that arrives while sends are in
flight waits in ENDING, so blocks are freed late, never early. Who reads blocks in place is no
send, and finds out afterwards that they were freed. Before it is complete the blocks are the
engine's to take back (preemption): that is another `revision`, and what was read in the one
before is not sent.

Consumer: OFFERED -> FETCHING -> LOADED, or FAILED. Exactly one report leaves each side.

Anything the tables do not list raises `IllegalEvent` and leaves the state unchanged.
"""

import enum
from dataclasses import dataclass, replace

from kv_transfer.layout import Read


class IllegalEvent(ValueError):
    """The event cannot happen in this state; the state is unchanged."""


class ProducerState(enum.Enum):
    FILLING = "filling"
    FEEDING = "feeding"
    HELD = "held"
    SENDING = "sending"
    ENDING = "ending"
    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"


class ProducerEvent(enum.Enum):
    READ_STARTED = "read started"
    READ_ENDED = "read ended"
    REVOKED = "revoked"
    COMPLETED = "completed"
    RELEASED = "released"
    EXPIRED = "expired"
    ABORTED = "aborted"


_P, _PE = ProducerState, ProducerEvent

_ENDS = {_PE.RELEASED: _P.RELEASED, _PE.EXPIRED: _P.EXPIRED, _PE.ABORTED: _P.ABORTED}

PRODUCER_TABLE: dict[tuple[ProducerState, ProducerEvent], ProducerState] = {
    (_P.FILLING, _PE.READ_STARTED): _P.FEEDING,
    (_P.FEEDING, _PE.READ_STARTED): _P.FEEDING,
    (_P.FEEDING, _PE.READ_ENDED): _P.FEEDING,
    (_P.FILLING, _PE.REVOKED): _P.FILLING,
    (_P.FEEDING, _PE.REVOKED): _P.FEEDING,
    (_P.FILLING, _PE.COMPLETED): _P.HELD,
    (_P.FEEDING, _PE.COMPLETED): _P.SENDING,
    (_P.HELD, _PE.READ_STARTED): _P.SENDING,
    (_P.SENDING, _PE.READ_STARTED): _P.SENDING,
    (_P.SENDING, _PE.READ_ENDED): _P.SENDING,
    (_P.ENDING, _PE.READ_ENDED): _P.ENDING,
    # While it is computed nobody but the engine can end it.
    (_P.FILLING, _PE.ABORTED): _P.ABORTED,
    (_P.FEEDING, _PE.ABORTED): _P.ENDING,
    **{(_P.HELD, event): state for event, state in _ENDS.items()},
    **{(_P.SENDING, event): _P.ENDING for event in _ENDS},
}
_WITHOUT_SENDS = {_P.FEEDING: _P.FILLING, _P.SENDING: _P.HELD}


@dataclass(frozen=True, slots=True)
class ProducerHandoff:
    """One KV cache. `end` is what it will have ended as once its sends are over; `revision`
    counts how often its blocks were taken back while it was computed."""

    state: ProducerState = ProducerState.HELD
    num_sends: int = 0
    end: ProducerState | None = None
    revision: int = 0

    @property
    def is_readable(self) -> bool:
        """Whether a read of finished blocks may be served: until somebody ends the hand-off."""
        return self.is_filling or self.state in (ProducerState.HELD, ProducerState.SENDING)

    @property
    def is_filling(self) -> bool:
        """Whether the prompt is still being computed."""
        return self.state in (ProducerState.FILLING, ProducerState.FEEDING)

    @property
    def is_over(self) -> bool:
        """Whether its blocks may be freed."""
        return self.state in _ENDS.values()

    def advance(self, event: ProducerEvent) -> "ProducerHandoff":
        """Return the next state; raise `IllegalEvent`."""
        following = PRODUCER_TABLE.get((self.state, event))
        if following is None:
            raise IllegalEvent(f"{event.value} while {self.state.value}")
        if event is ProducerEvent.READ_STARTED:
            return replace(self, state=following, num_sends=self.num_sends + 1)
        if event is ProducerEvent.READ_ENDED:
            return self._after_send()
        if event is ProducerEvent.REVOKED:
            return replace(self, state=following, revision=self.revision + 1)
        return replace(self, state=following, end=_ENDS.get(event))

    def _after_send(self) -> "ProducerHandoff":
        num_sends = self.num_sends - 1
        if num_sends:
            return replace(self, num_sends=num_sends)
        if self.end is not None:
            return replace(self, num_sends=0, state=self.end)
        return replace(self, num_sends=0, state=_WITHOUT_SENDS[self.state])


class ConsumerState(enum.Enum):
    OFFERED = "offered"
    FETCHING = "fetching"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ConsumerHandoff:
    """One pull: `waiting` reads are not asked for yet, `asked` ones are on their way."""

    waiting: tuple[Read, ...]
    window: int
    state: ConsumerState = ConsumerState.OFFERED
    asked: frozenset[Read] = frozenset()
    failure: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state in (ConsumerState.LOADED, ConsumerState.FAILED)

    def start(self) -> tuple["ConsumerHandoff", tuple[Read, ...]]:
        """Begin; return the reads to ask for. Nothing to read is loaded at once."""
        if self.state is not ConsumerState.OFFERED:
            raise IllegalEvent(f"start while {self.state.value}")
        return replace(self, state=ConsumerState.FETCHING)._ask()

    def receive(self, read: Read) -> tuple["ConsumerHandoff", tuple[Read, ...]]:
        """Account for blocks that arrived intact; return the reads to ask for next.

        Raises `IllegalEvent` for blocks that were not asked for or came twice.
        """
        if self.state is not ConsumerState.FETCHING or read not in self.asked:
            raise IllegalEvent(f"{read} while {self.state.value}")
        return replace(self, asked=self.asked - {read})._ask()

    def merge(self, most_blocks: int) -> "ConsumerHandoff":
        """Make one read of waiting ones that follow each other, of `most_blocks` at most."""
        merged: list[Read] = []
        for read in sorted(self.waiting, key=lambda read: (read.group, read.first_block)):
            last = merged[-1] if merged else None
            if last is not None and last.is_followed_by(read, most_blocks):
                merged[-1] = replace(last, num_blocks=last.num_blocks + read.num_blocks)
            else:
                merged.append(read)
        return replace(self, waiting=tuple(merged))

    def fail(self, reason: str) -> "ConsumerHandoff":
        """End without the blocks: refused, damaged, stalled or cancelled."""
        if self.is_over:
            raise IllegalEvent(f"failure while {self.state.value}")
        return replace(
            self, state=ConsumerState.FAILED, waiting=(), asked=frozenset(), failure=reason
        )

    def _ask(self) -> tuple["ConsumerHandoff", tuple[Read, ...]]:
        room = self.window - len(self.asked)
        reads, waiting = self.waiting[:room], self.waiting[room:]
        asked = self.asked | set(reads)
        state = self.state if asked else ConsumerState.LOADED
        return replace(self, state=state, asked=asked, waiting=waiting), reads
