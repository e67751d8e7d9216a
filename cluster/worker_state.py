"""The nouns of the controller's plan: a worker's states, and what is observed and desired."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.names import Role, WorkerId
from cluster.pairing import NO_LAYOUT, CacheLayout


class WorkerState(enum.StrEnum):
    """A worker's life. Routers see `READY` and, under its new role, `FLIPPING`."""

    PENDING = "pending"
    STARTING = "starting"
    WARMING = "warming"
    HELD = "held"  # proven, kept back by the discovery gate
    FLIPPING = "flipping"  # taking another role once its last request has ended
    READY = "ready"
    STANDBY = "standby"  # engine loaded, in no pool
    SOFT_OUT = "soft_out"  # off the list, running, may be restored
    DRAINING = "draining"
    STOPPING = "stopping"


# What counts against a pool's wanted size, the least costly to give up first.
PROVISIONED = (
    WorkerState.PENDING,
    WorkerState.STARTING,
    WorkerState.WARMING,
    WorkerState.HELD,
    WorkerState.FLIPPING,
    WorkerState.READY,
)

Pair = tuple[WorkerId, WorkerId]


@dataclass(frozen=True, slots=True)
class ObservedWorker:
    """One worker as the plan sees it.

    `since` is when it entered its state (Unix seconds); `is_spare` marks one that was started
    to become a standby. `reported_role` and the counts are its own latest answer. `work` is the
    number of tokens it has computed, a stand-in for how warm its prefix cache is; `value` the
    priority of its network domain, higher to be freed sooner; `layout` its KV cache's, which it
    says when it is up.
    """

    worker_id: WorkerId
    role: Role
    state: WorkerState
    since: float = 0.0
    is_spare: bool = False
    reported_role: Role | None = None
    num_requests: int = 0
    num_held_blocks: int = 0
    work: int = 0
    value: int = 0
    layout: CacheLayout = NO_LAYOUT

    @property
    def is_idle(self) -> bool:
        """Whether it said that it has nothing open; one just taken over has said nothing."""
        is_known = self.reported_role is not None
        return is_known and self.num_requests == 0 and self.num_held_blocks == 0


_FIRST_BACKOFF_S = 1.0
_LAST_BACKOFF_S = 60.0


def backoff_s(failures: int) -> float:
    """Return how long to wait after this many failures in a row."""
    return min(_FIRST_BACKOFF_S * 2.0 ** (failures - 1), _LAST_BACKOFF_S) if failures else 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """Failures in a row, when the last one happened, and why."""

    failures: int
    last_at: float
    reason: str

    def by_clock(self, now: float) -> "Trouble":
        """Return the same, not later than `now`: the clock may have been set back."""
        return replace(self, last_at=min(self.last_at, now))

    @property
    def retry_at(self) -> float:
        return self.last_at + backoff_s(self.failures)


@dataclass(frozen=True, slots=True)
class Observed:
    """Workers, which pairs proved a hand-off, and what went wrong since it last went right.

    A pair is (prefill worker, decode worker).
    """

    workers: tuple[ObservedWorker, ...] = ()
    proven: frozenset[Pair] = frozenset()
    testing: frozenset[Pair] = frozenset()
    failed_proofs: Mapping[Pair, Trouble] = field(default_factory=dict)
    failed_starts: Mapping[Role, Trouble] = field(default_factory=dict)

    def pool(self, role: Role, *states: WorkerState) -> list[ObservedWorker]:
        """Return the role's workers in `states`, spares left out."""
        return [w for w in self.workers if w.role is role and w.state in states and not w.is_spare]

    @property
    def handed_over(self) -> frozenset[WorkerId]:
        """Return who has handed a KV cache over, or taken one, with somebody who is still here."""
        return frozenset(worker_id for pair in self.proven for worker_id in pair)

    def in_state(self, *states: WorkerState) -> list[ObservedWorker]:
        return [w for w in self.workers if w.state in states]


@dataclass(frozen=True, slots=True)
class Desired:
    """Pool sizes, and the rules for getting there.

    `proof` makes new workers hand over before they are listed; `standby` workers are kept with
    their engine loaded; a worker taken out stays restorable for `soft_out_s`, then drains for at
    most `drain_timeout_s`. Ready workers beyond the sizes' ratio by more than `gate_tolerance`
    are held back, None holds none. `can_flip`: both pools run the same engine configuration.
    """

    workers: Mapping[Role, int]
    proof: bool = True
    standby: int = 0
    soft_out_s: float = 0.0
    drain_timeout_s: float = 600.0
    gate_tolerance: float | None = None
    can_flip: bool = True


@dataclass(frozen=True, slots=True)
class StartWorker:
    role: Role
    reason: str
    is_spare: bool = False


@dataclass(frozen=True, slots=True)
class ProveHandoff:
    """Move a prompt's KV cache from one worker to the other and look at what arrived."""

    pair: Pair
    reason: str


@dataclass(frozen=True, slots=True)
class Enter:
    """Put a worker into `state`, as which it serves, waits or leaves."""

    worker_id: WorkerId
    state: WorkerState
    reason: str


@dataclass(frozen=True, slots=True)
class TakeRole:
    """Have a worker serve in `role` once its last request of the old one has ended."""

    worker_id: WorkerId
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    worker_id: WorkerId
    reason: str
    is_failure: bool = False


Action = StartWorker | ProveHandoff | Enter | TakeRole | StopWorker
