"""What the controller should do next: desired pools and observed workers in, actions out.

Pure: `now` (Unix seconds) is passed in, nothing is read or changed. The controller calls it on
every change and executes what it returns; a decision that is not executed is made again.
"""

from collections.abc import Iterator

from cluster.gate import num_exposable
from cluster.names import Role, WorkerId
from cluster.pairing import mismatch
from cluster.pool_size import resize
from cluster.worker_state import (
    Action,
    Desired,
    Enter,
    Observed,
    ObservedWorker,
    Pair,
    ProveHandoff,
    StopWorker,
    TakeRole,
    WorkerState,
)

MAX_PROOFS = 3
FAILING_AFTER = 2
# Who can hand over, those that serve last.
_UP = (WorkerState.WARMING, WorkerState.HELD, WorkerState.READY)
_COMING = (WorkerState.PENDING, WorkerState.STARTING)


def decide(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """Return the actions that bring `observed` closer to `desired`, each with its reason."""
    actions = resize(desired, observed, now)
    leaving = {a.worker_id for a in actions if isinstance(a, StopWorker | Enter | TakeRole)}
    unpaired = list(_stop_unpaired(observed, leaving))
    leaving |= {action.worker_id for action in unpaired}
    proofs = list(_prove(observed, leaving, now)) if desired.proof else []
    leaving |= {action.worker_id for action in proofs if isinstance(action, StopWorker)}
    return [*actions, *unpaired, *proofs, *_expose(desired, observed, leaving)]


def refused_pairs(observed: Observed) -> dict[Pair, str]:
    """Return the pairs of workers that are up and never hand over to each other, and why: the
    layouts of their KV caches differ."""
    up = observed.in_state(*_UP)
    if len({worker.layout for worker in up}) < 2:
        return {}
    prefills, decodes = ([w for w in up if w.role is r] for r in (Role.PREFILL, Role.DECODE))
    pairs = {(p.worker_id, d.worker_id): _mismatch(p, d) for p in prefills for d in decodes}
    return {pair: reason for pair, reason in pairs.items() if reason is not None}


def _mismatch(one: ObservedWorker, other: ObservedWorker) -> str | None:
    return mismatch((one.worker_id, one.layout), (other.worker_id, other.layout))


def _stop_unpaired(observed: Observed, leaving: set[WorkerId]) -> Iterator[StopWorker]:
    """Stop newcomers that could hand over to nobody, once nobody else of the other role comes."""
    for worker in observed.in_state(WorkerState.WARMING):
        peers = [w for w in observed.in_state(*_UP, *_COMING) if w.role is not worker.role]
        if worker.worker_id in leaving or any(peer.state in _COMING for peer in peers):
            continue
        reasons = [_mismatch(worker, peer) for peer in peers]
        if reasons and all(reasons):
            yield StopWorker(worker.worker_id, f"it fits no peer: {reasons[0]}", is_failure=True)


def _pairs_to_prove(observed: Observed) -> dict[Pair, tuple[ObservedWorker, ObservedWorker]]:
    """Return a (prefill, decode) pair for every new worker that has not handed over yet.

    Its peer is one whose KV cache fits, that serves if any does, and not the same one for all
    newcomers.
    """
    handed_over = observed.handed_over
    up = sorted(observed.in_state(*_UP), key=lambda worker: -_UP.index(worker.state))
    pairs: dict[Pair, tuple[ObservedWorker, ObservedWorker]] = {}
    for number, worker in enumerate(observed.in_state(WorkerState.WARMING)):
        others = [p for p in up if p.role is not worker.role and p.layout == worker.layout]
        if worker.worker_id in handed_over or not others:
            continue
        peers = [peer for peer in others if peer.state is others[0].state]
        pair = sorted((worker, peers[number % len(peers)]), key=lambda w: w.role, reverse=True)
        pairs[pair[0].worker_id, pair[1].worker_id] = (pair[0], pair[1])
    return pairs


def _prove(observed: Observed, leaving: set[WorkerId], now: float) -> Iterator[Action]:
    failed: set[WorkerId] = set()
    for pair, (prefill, decode) in _pairs_to_prove(observed).items():
        if pair in observed.testing or not failed.union(leaving).isdisjoint(pair):
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
    handed_over = observed.handed_over
    return [worker_id for worker_id in new if worker_id not in handed_over] or new


def _expose(desired: Desired, observed: Observed, leaving: set[WorkerId]) -> Iterator[Action]:
    """List workers that are proven, or hold them back, or park them; end role changes."""
    proven = [w for w in _proven(desired, observed) if w.worker_id not in leaving]
    for worker in proven:
        if worker.is_spare:
            yield Enter(worker.worker_id, WorkerState.STANDBY, "loaded and warm")
    for worker in observed.in_state(WorkerState.FLIPPING):
        if worker.reported_role is worker.role and worker.worker_id not in leaving:
            yield Enter(worker.worker_id, WorkerState.READY, f"serves as {worker.role}")
    candidates = {role: [w for w in proven if w.role is role and not w.is_spare] for role in Role}
    yield from _gate(desired, observed, candidates)


def _proven(desired: Desired, observed: Observed) -> list[ObservedWorker]:
    """Return the workers not yet listed that may be: held ones, and new ones that handed over."""
    handed_over = observed.handed_over
    return [
        worker
        for worker in observed.in_state(WorkerState.WARMING, WorkerState.HELD)
        if worker.state is WorkerState.HELD or not desired.proof or worker.worker_id in handed_over
    ]


def _gate(
    desired: Desired, observed: Observed, candidates: dict[Role, list[ObservedWorker]]
) -> Iterator[Action]:
    exposed = {role: len(observed.pool(role, WorkerState.READY)) for role in Role}
    ready = {role: exposed[role] + len(candidates[role]) for role in Role}
    for role, workers in candidates.items():
        room = len(workers)
        if desired.gate_tolerance is not None:
            limit = num_exposable(role, ready, exposed, desired.workers, desired.gate_tolerance)
            room = limit - exposed[role]
        for worker in workers[:room]:
            yield Enter(worker.worker_id, WorkerState.READY, "warm")
        for worker in workers[room:]:
            if worker.state is WorkerState.WARMING:
                counts = f"{ready[Role.PREFILL]} prefill, {ready[Role.DECODE]} decode ready"
                yield Enter(worker.worker_id, WorkerState.HELD, f"waits for the ratio: {counts}")


def health(observed: Observed) -> tuple[bool, str]:
    """Return whether both pools serve, and if not, why."""
    missing = [role for role in Role if not observed.pool(role, WorkerState.READY)]
    if not missing:
        return True, "serving"
    reasons = [f"no warm {role} worker" for role in missing]
    reasons += [*refused_pairs(observed).values()]
    reasons += [t.reason for t in observed.failed_proofs.values()]
    reasons += [f"{role}: {t.reason}" for role, t in observed.failed_starts.items()]
    return False, "; ".join(dict.fromkeys(reasons))


def is_failing(observed: Observed) -> bool:
    """Return whether a pool that has no warm worker keeps failing to get one."""
    return any(
        trouble.failures >= FAILING_AFTER and not observed.pool(role, WorkerState.READY)
        for role, trouble in observed.failed_starts.items()
    )
