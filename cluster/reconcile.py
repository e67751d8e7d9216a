"""What the controller should do next: desired pools and observed workers in, actions out.

Pure: `now` is passed in, nothing is read or changed. The controller calls it on every change
and executes what it returns; a decision that is not executed is simply made again.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.names import Role, WorkerId

MAX_PROOFS = 3
FAILING_AFTER = 2
_FIRST_BACKOFF_S = 1.0
_LAST_BACKOFF_S = 60.0

Pair = tuple[WorkerId, WorkerId]


class WorkerState(enum.StrEnum):
    """A worker's life, in order; `READY` is the only state routers see."""

    PENDING = "pending"
    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    STOPPING = "stopping"


_UP = (WorkerState.WARMING, WorkerState.READY)


@dataclass(frozen=True, slots=True)
class ObservedWorker:
    worker_id: WorkerId
    role: Role
    state: WorkerState


@dataclass(frozen=True, slots=True)
class Trouble:
    """Failures in a row, when the last one happened, and why."""

    failures: int
    last_at: float
    reason: str

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
        return [w for w in self.workers if w.role is role and w.state in states]


@dataclass(frozen=True, slots=True)
class Desired:
    """Pool sizes, and whether workers must prove a hand-off before they are listed."""

    workers: Mapping[Role, int]
    proof: bool = True


@dataclass(frozen=True, slots=True)
class StartWorker:
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class ProveHandoff:
    """Move a prompt's KV cache from one worker to the other and look at what arrived."""

    pair: Pair
    reason: str


@dataclass(frozen=True, slots=True)
class ListWorker:
    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    worker_id: WorkerId
    reason: str
    is_failure: bool = False


Action = StartWorker | ProveHandoff | ListWorker | StopWorker


def backoff_s(failures: int) -> float:
    """Return how long to wait after this many failures in a row."""
    return min(_FIRST_BACKOFF_S * 2.0 ** (failures - 1), _LAST_BACKOFF_S) if failures else 0.0


def decide(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """Return the actions that bring `observed` closer to `desired`, each with its reason."""
    actions: list[Action] = []
    for role in Role:
        actions += _resize(role, desired.workers[role], observed, now)
    if not desired.proof:
        reason = "started; warm-up is switched off"
        warming = [w for w in observed.workers if w.state is WorkerState.WARMING]
        return [*actions, *(ListWorker(w.worker_id, reason) for w in warming)]
    stopping = [a.worker_id for a in actions if isinstance(a, StopWorker)]
    return [*actions, *_prove(observed, stopping, now), *_list(observed, stopping)]


def _resize(role: Role, wanted: int, observed: Observed, now: float) -> Iterator[Action]:
    alive = observed.pool(role, *(s for s in WorkerState if s is not WorkerState.STOPPING))
    trouble = observed.failed_starts.get(role)
    if len(alive) < wanted and (trouble is None or now >= trouble.retry_at):
        reason = f"{len(alive)} of {wanted} {role} workers"
        if trouble is not None:
            reason += f"; try {trouble.failures + 1} after: {trouble.reason}"
        yield from (StartWorker(role, reason) for _ in range(wanted - len(alive)))
    states = list(WorkerState)
    youngest_first = sorted(alive, key=lambda w: states.index(w.state))
    for worker in youngest_first[: max(0, len(alive) - wanted)]:
        yield StopWorker(worker.worker_id, f"{len(alive)} {role} workers, {wanted} wanted")


def _open_pairs(observed: Observed) -> Iterator[tuple[ObservedWorker, ObservedWorker]]:
    """Yield the pairs that still have to prove a hand-off: one side up, the other not listed."""
    for prefill in observed.pool(Role.PREFILL, *_UP):
        for decode in observed.pool(Role.DECODE, *_UP):
            is_new = WorkerState.WARMING in (prefill.state, decode.state)
            if is_new and (prefill.worker_id, decode.worker_id) not in observed.proven:
                yield prefill, decode


def _prove(observed: Observed, stopping: list[WorkerId], now: float) -> Iterator[Action]:
    failed: set[WorkerId] = set()
    for prefill, decode in _open_pairs(observed):
        pair = (prefill.worker_id, decode.worker_id)
        if pair in observed.testing or not failed.union(stopping).isdisjoint(pair):
            continue
        trouble = observed.failed_proofs.get(pair)
        if trouble is None or trouble.failures < MAX_PROOFS:
            if trouble is None or now >= trouble.retry_at:
                yield ProveHandoff(pair, "first hand-off" if trouble is None else trouble.reason)
            continue
        for suspect in _suspects(prefill, decode, observed):
            failed.add(suspect)
            reason = f"{trouble.failures} warm-up hand-offs failed: {trouble.reason}"
            yield StopWorker(suspect, reason, is_failure=True)


def _suspects(
    prefill: ObservedWorker, decode: ObservedWorker, observed: Observed
) -> list[WorkerId]:
    """Return whose fault a failing pair is: new workers, and of those the ones that never
    handed anything over with another peer either."""
    new = [w.worker_id for w in (prefill, decode) if w.state is WorkerState.WARMING]
    proven = {worker_id for pair in observed.proven for worker_id in pair}
    return [worker_id for worker_id in new if worker_id not in proven] or new


def _list(observed: Observed, stopping: list[WorkerId]) -> Iterator[Action]:
    """List a worker once it has handed over with every worker of the other role that is up."""
    waiting = {w.worker_id for pair in _open_pairs(observed) for w in pair}
    for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        peers = observed.pool(other, *_UP)
        for worker in observed.pool(role, WorkerState.WARMING):
            if peers and worker.worker_id not in waiting and worker.worker_id not in stopping:
                reason = f"handed over with {len(peers)} {other} worker(s)"
                yield ListWorker(worker.worker_id, reason)


def health(observed: Observed) -> tuple[bool, str]:
    """Return whether both pools serve, and if not, why."""
    missing = [role for role in Role if not observed.pool(role, WorkerState.READY)]
    if not missing:
        return True, "serving"
    reasons = [f"no warm {role} worker" for role in missing]
    reasons += [t.reason for t in observed.failed_proofs.values()]
    reasons += [f"{role}: {t.reason}" for role, t in observed.failed_starts.items()]
    return False, "; ".join(dict.fromkeys(reasons))


def is_failing(observed: Observed) -> bool:
    """Return whether a pool that has no warm worker keeps failing to get one."""
    return any(
        trouble.failures >= FAILING_AFTER and not observed.pool(role, WorkerState.READY)
        for role, trouble in observed.failed_starts.items()
    )
