"""Step 8: when things happened to a request, and the latencies that follow. Pure.

The definitions exist here and nowhere else. TTFT: arrival to the first token. ITL: between two
answers with tokens. TPOT: from the first token to the last, per token after the first. E2E:
arrival to the end.
"""

import enum
from dataclasses import dataclass, field

from cluster.names import Stage


class Event(enum.StrEnum):
    """What can happen to a request; several of them once per attempt."""

    ARRIVED = "arrived"
    PLACED = "placed"
    PREFILLED = "prefilled"
    SET_BACK = "set_back"
    FIRST_TOKEN = "first_token"
    DECODING = "decoding"
    FINISHED = "finished"


# The first token is no stage's beginning: prefill's comes before the hand-off, decode's after it.
STAGE_AFTER = {
    Event.ARRIVED: Stage.QUEUED,
    Event.PLACED: Stage.PREFILL,
    Event.PREFILLED: Stage.TRANSFER,
    Event.SET_BACK: Stage.QUEUED,
    Event.DECODING: Stage.DECODE,
    Event.FINISHED: Stage.FINISHED,
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """`at_s` counts from the request's arrival."""

    event: Event
    at_s: float


@dataclass(slots=True)
class Timeline:
    """One request's stamps; `arrived_s` is the shell's monotonic clock."""

    arrived_s: float
    stamps: list[Stamp] = field(default_factory=lambda: [Stamp(Event.ARRIVED, 0.0)])
    num_tokens: int = 0
    last_token_s: float | None = None
    max_gap_s: float | None = None

    @property
    def stage(self) -> Stage:
        return next(
            STAGE_AFTER[stamp.event]
            for stamp in reversed(self.stamps)
            if stamp.event in STAGE_AFTER
        )

    def stamp(self, event: Event, now: float) -> None:
        self.stamps.append(Stamp(event, now - self.arrived_s))

    def record_tokens(self, num_tokens: int, now: float) -> float | None:
        """Count an answer's tokens; return the time since the tokens before, None for the first."""
        at_s = now - self.arrived_s
        if num_tokens == 0:
            return None
        gap_s = None if self.last_token_s is None else at_s - self.last_token_s
        if gap_s is not None:
            self.max_gap_s = max(gap_s, self.max_gap_s or 0.0)
        self.num_tokens += num_tokens
        self.last_token_s = at_s
        return gap_s

    @property
    def queue_s(self) -> float | None:
        """Arrival to the first placement."""
        return self._first(Event.PLACED)

    @property
    def prefill_s(self) -> float | None:
        """Placement to prefilled, of the last attempt that got there."""
        return self._between(Event.PLACED, Event.PREFILLED)

    @property
    def transfer_s(self) -> float | None:
        """Prefilled to decode's first token: the hand-off, and decode's first step."""
        return self._between(Event.PREFILLED, Event.DECODING)

    @property
    def ttft_s(self) -> float | None:
        return self._first(Event.FIRST_TOKEN)

    @property
    def tpot_s(self) -> float | None:
        if self.ttft_s is None or self.last_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return self._first(Event.FINISHED)

    def as_document(self) -> dict[str, object]:
        return {
            "events": [{"event": stamp.event.value, "at_s": stamp.at_s} for stamp in self.stamps],
            "output_tokens": self.num_tokens,
            "queue_s": self.queue_s,
            "prefill_s": self.prefill_s,
            "transfer_s": self.transfer_s,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "max_itl_s": self.max_gap_s,
            "e2e_s": self.e2e_s,
        }

    def _first(self, event: Event) -> float | None:
        return next((stamp.at_s for stamp in self.stamps if stamp.event is event), None)

    def _between(self, start: Event, end: Event) -> float | None:
        """Return the time between the last `end` and the last `start` before it."""
        began_s: float | None = None
        took_s: float | None = None
        for stamp in self.stamps:
            if stamp.event is start:
                began_s = stamp.at_s
            elif stamp.event is end and began_s is not None:
                took_s, began_s = stamp.at_s - began_s, None
            elif stamp.event is Event.SET_BACK:
                began_s = None
        return took_s
