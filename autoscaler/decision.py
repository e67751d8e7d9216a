"""The words of a decision: what was decided and why, and what the next one must remember."""

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from autoscaler.ratio import Sizes
from autoscaler.windows import Reading, reading_as_document, reading_from_document


class Action(enum.StrEnum):
    """What happens to the pools; only a repair may move one pool alone or both apart."""

    HOLD = "hold"
    OUT = "out"
    IN = "in"
    REPAIR = "repair"
    RESTORE = "restore"


class Driver(enum.StrEnum):
    """What the final sizes rest on."""

    SIGNAL = "signal"
    ARRIVALS = "arrivals"
    LATENCY = "latency"
    CALENDAR = "calendar"
    RATIO = "ratio"
    OBSERVATION = "observation"
    LIMITS = "limits"
    PIN = "pin"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Input:
    """One number that the decision looked at."""

    name: str
    value: Reading


@dataclass(frozen=True, slots=True)
class Clamp:
    """One law that changed the sizes on their way from the raw to the final target."""

    name: str
    before: Sizes
    after: Sizes
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The sizes from `now` on; `raw` is what the driver asked for, None if it asked nothing.

    Read in order, the fields explain it: inputs, raw target, each clamp, the final sizes.
    """

    now: float
    inputs: tuple[Input, ...]
    current: Sizes
    raw: Sizes | None
    clamps: tuple[Clamp, ...]
    final: Sizes
    action: Action
    driver: Driver
    reason: str

    def as_document(self) -> dict[str, Any]:
        return {
            "now": self.now,
            "inputs": [[each.name, reading_as_document(each.value)] for each in self.inputs],
            "current": self.current.as_document(),
            "raw": None if self.raw is None else self.raw.as_document(),
            "clamps": [
                [each.name, each.before.as_document(), each.after.as_document(), each.reason]
                for each in self.clamps
            ],
            "final": self.final.as_document(),
            "action": self.action.value,
            "driver": self.driver.value,
            "reason": self.reason,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        raw = document["raw"]
        return cls(
            now=float(document["now"]),
            inputs=tuple(
                Input(name, reading_from_document(value)) for name, value in document["inputs"]
            ),
            current=Sizes.from_document(document["current"]),
            raw=None if raw is None else Sizes.from_document(raw),
            clamps=tuple(
                Clamp(name, Sizes.from_document(before), Sizes.from_document(after), reason)
                for name, before, after, reason in document["clamps"]
            ),
            final=Sizes.from_document(document["final"]),
            action=Action(document["action"]),
            driver=Driver(document["driver"]),
            reason=str(document["reason"]),
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """Sizes ordered by hand, and why; they hold until the pin is taken away."""

    sizes: Sizes
    reason: str


_STAMPS = ("decided_at", "last_out_at", "last_in_at", "bypassed_at", "breached_at")


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What one decision leaves to the next; times are Unix seconds, None for never.

    `target` is what the pools are meant to be, whether or not they have got there: dead and
    unplaced workers are the controller's business. `size_before_in` is kept while the last
    scale-in can still be taken back.
    """

    target: Sizes
    decided_at: float | None = None
    last_out_at: float | None = None
    last_in_at: float | None = None
    bypassed_at: float | None = None
    breached_at: float | None = None
    backoff_until: float | None = None
    size_before_in: Sizes | None = None
    estimated_ratio: float | None = None
    pin: Pin | None = None

    def as_document(self) -> dict[str, Any]:
        before, pin = self.size_before_in, self.pin
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **plain,
            "target": self.target.as_document(),
            "size_before_in": None if before is None else before.as_document(),
            "pin": None if pin is None else [pin.sizes.as_document(), pin.reason],
        }

    def by_clock(self, now: float, backoff_s: float) -> Self:
        """Return the state with no stamp after `now`, nor a backoff that begins after it.

        A clock that was set back leaves stamps in the future; cooldowns on them would last until
        the clock has caught up. As if they had happened just now they last their length.
        """
        stamps = {name: getattr(self, name) for name in _STAMPS}
        late: dict[str, Any] = {
            name: now for name, at in stamps.items() if at is not None and at > now
        }
        until = self.backoff_until
        if until is not None and until > now + backoff_s:
            late["backoff_until"] = now + backoff_s
        return dataclasses.replace(self, **late)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        before, pin = document["size_before_in"], document["pin"]
        changed = {
            "target": Sizes.from_document(document["target"]),
            "size_before_in": None if before is None else Sizes.from_document(before),
            "pin": None if pin is None else Pin(Sizes.from_document(pin[0]), str(pin[1])),
        }
        return cls(**{**document, **changed})
