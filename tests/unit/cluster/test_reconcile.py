"""The controller's decisions: sizes, warm-up hand-offs, blame, and when to try again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.names import Role, WorkerId
from cluster.pairing import CacheLayout
from cluster.reconcile import MAX_PROOFS, decide, health, is_failing, refused_pairs
from cluster.worker_state import (
    PROVISIONED,
    Action,
    Desired,
    Enter,
    Observed,
    ObservedWorker,
    Pair,
    ProveHandoff,
    StartWorker,
    StopWorker,
    TakeRole,
    Trouble,
    WorkerState,
    backoff_s,
)

PREFILL, DECODE = Role.PREFILL, Role.DECODE
PENDING, WARMING, READY = WorkerState.PENDING, WorkerState.WARMING, WorkerState.READY
HELD = WorkerState.HELD
ONE_EACH = Desired({PREFILL: 1, DECODE: 1})


def worker(name: str, state: WorkerState) -> ObservedWorker:
    return ObservedWorker(WorkerId(name), PREFILL if name.startswith("p") else DECODE, state)


def pool(**states: WorkerState) -> tuple[ObservedWorker, ...]:
    return tuple(worker(name, state) for name, state in states.items())


def laid_out(workers: tuple[ObservedWorker, ...], **block_sizes: int) -> tuple[ObservedWorker, ...]:
    """Return `workers`, those that are up by now with a KV cache of such blocks."""
    layouts = {name: CacheLayout(f"{n}", {"block_size": f"{n}"}) for name, n in block_sizes.items()}
    return tuple(replace(w, layout=layouts.get(w.worker_id, w.layout)) for w in workers)


def pair(prefill: str, decode: str) -> Pair:
    return WorkerId(prefill), WorkerId(decode)


def kinds(actions: list[Action]) -> list[tuple[str, object]]:
    """Return each action as its name and what it is about, without its reason."""
    return [_kind(action) for action in actions]


def _kind(action: Action) -> tuple[str, object]:
    match action:
        case StartWorker(role, _, is_spare):
            return "spare" if is_spare else "start", role
        case ProveHandoff(pair):
            return "prove", pair
        case Enter(worker_id, state):
            return state.value, worker_id
        case TakeRole(worker_id, role):
            return f"become {role}", worker_id
        case StopWorker(worker_id):
            return "stop", worker_id


def test_starts_what_is_missing_in_both_pools() -> None:
    actions = decide(Desired({PREFILL: 2, DECODE: 1}), Observed(pool(p1=READY)), now=0.0)
    assert kinds(actions) == [("start", PREFILL), ("start", DECODE)]
    assert actions[0].reason == "1 of 2 prefill workers"


def test_stops_the_youngest_of_too_many() -> None:
    observed = Observed(pool(p1=READY, p2=PENDING, d1=READY))
    assert kinds(decide(ONE_EACH, observed, now=0.0)) == [("stop", "p2")]


def test_a_stopping_worker_counts_as_gone() -> None:
    observed = Observed(pool(p1=WorkerState.STOPPING, d1=READY))
    assert kinds(decide(ONE_EACH, observed, now=0.0)) == [("start", PREFILL)]


def test_a_pool_in_trouble_waits_out_its_backoff() -> None:
    trouble = Trouble(failures=3, last_at=10.0, reason="boom")
    observed = Observed(pool(d1=READY), failed_starts={PREFILL: trouble})
    assert decide(ONE_EACH, observed, now=10.0 + backoff_s(3) - 0.01) == []
    (action,) = decide(ONE_EACH, observed, now=10.0 + backoff_s(3))
    assert action.reason == "0 of 1 prefill workers; try 4 after: boom"


@given(st.integers(0, 200))
def test_backoff_grows_and_is_bounded(failures: int) -> None:
    assert 0.0 <= backoff_s(failures) <= backoff_s(failures + 1) <= 60.0


def test_every_new_pair_proves_a_handoff_before_anyone_is_listed() -> None:
    observed = Observed(pool(p1=WARMING, p2=WARMING, d1=WARMING))
    actions = decide(Desired({PREFILL: 2, DECODE: 1}), observed, now=0.0)
    assert kinds(actions) == [
        ("prove", ("p1", "d1")),
        ("prove", ("p2", "d1")),
    ]


def test_a_running_proof_is_not_started_twice() -> None:
    observed = Observed(pool(p1=WARMING, d1=WARMING), testing=frozenset({pair("p1", "d1")}))
    assert decide(ONE_EACH, observed, now=0.0) == []


def test_a_proven_pair_is_listed() -> None:
    observed = Observed(pool(p1=WARMING, d1=WARMING), proven=frozenset({pair("p1", "d1")}))
    assert kinds(decide(ONE_EACH, observed, now=0.0)) == [
        ("ready", "p1"),
        ("ready", "d1"),
    ]


def test_a_newcomer_hands_over_with_a_peer_that_serves() -> None:
    workers = pool(p1=WARMING, p2=READY, d1=READY, d2=WARMING)
    desired = Desired({PREFILL: 2, DECODE: 2})
    actions = decide(desired, Observed(workers), now=0.0)
    assert kinds(actions) == [("prove", ("p1", "d1")), ("prove", ("p2", "d2"))]
    observed = Observed(workers, proven=frozenset({pair("p2", "d2")}))
    assert kinds(decide(desired, observed, now=0.0)) == [("prove", ("p1", "d1")), ("ready", "d2")]


def test_a_worker_without_any_peer_is_not_listed() -> None:
    observed = Observed(pool(p1=WARMING, d1=PENDING))
    assert decide(ONE_EACH, observed, now=0.0) == []


def test_a_newcomer_is_proven_with_a_peer_whose_cache_fits() -> None:
    workers = pool(p1=READY, p2=READY, d1=WARMING)
    observed = Observed(laid_out(workers, p1=16, p2=32, d1=32))
    assert kinds(decide(Desired({PREFILL: 2, DECODE: 1}), observed, now=0.0)) == [
        ("prove", ("p2", "d1"))
    ]
    assert refused_pairs(observed) == {pair("p1", "d1"): "block_size is 16 on p1, 32 on d1"}


@pytest.mark.parametrize("proof", [True, False])
def test_a_newcomer_that_fits_nobody_is_stopped_and_the_others_serve(proof: bool) -> None:
    workers = laid_out(pool(p1=READY, d1=READY, d2=WARMING), p1=16, d1=16, d2=32)
    desired = Desired({PREFILL: 1, DECODE: 2}, proof=proof)
    (action,) = decide(desired, Observed(workers), now=0.0)
    assert action == StopWorker(
        WorkerId("d2"), "it fits no peer: block_size is 32 on d2, 16 on p1", is_failure=True
    )


def test_a_newcomer_waits_for_peers_that_are_still_to_come() -> None:
    workers = laid_out(pool(p1=WARMING, d1=READY, d2=PENDING), p1=32, d1=16)
    desired = Desired({PREFILL: 1, DECODE: 2})
    assert decide(desired, Observed(workers), now=0.0) == []
    is_healthy, reason = health(Observed(workers))
    assert not is_healthy and "block_size is 32 on p1, 16 on d1" in reason


def test_warm_up_can_be_switched_off() -> None:
    observed = Observed(pool(p1=WARMING, d1=PENDING))
    desired = Desired({PREFILL: 1, DECODE: 1}, proof=False)
    assert kinds(decide(desired, observed, now=0.0)) == [("ready", "p1")]


def failed(*pairs: Pair) -> dict[Pair, Trouble]:
    return {p: Trouble(MAX_PROOFS, 0.0, "0 of 263 prompt tokens arrived") for p in pairs}


@pytest.mark.parametrize(
    ("workers", "proven", "broken", "blamed"),
    [
        # A newcomer is to blame, not the worker that serves already.
        (pool(p1=READY, d1=WARMING), [], [pair("p1", "d1")], ["d1"]),
        # Two newcomers: nobody knows which.
        (pool(p1=WARMING, d1=WARMING), [], [pair("p1", "d1")], ["p1", "d1"]),
        # One of them has handed over with someone else.
        (
            pool(p1=WARMING, d1=WARMING, d2=WARMING),
            [pair("p1", "d2")],
            [pair("p1", "d1")],
            ["d1"],
        ),
    ],
)
def test_who_is_stopped_when_a_pair_keeps_failing(
    workers: tuple[ObservedWorker, ...], proven: list[Pair], broken: list[Pair], blamed: list[str]
) -> None:
    observed = Observed(workers, frozenset(proven), failed_proofs=failed(*broken))
    sizes = {role: len([w for w in workers if w.role is role]) for role in Role}
    actions = decide(Desired(sizes), observed, now=100.0)
    stopped = [action for action in actions if isinstance(action, StopWorker)]
    assert [action.worker_id for action in stopped] == blamed
    assert all(action.is_failure and "263 prompt tokens" in action.reason for action in stopped)


def test_a_failed_proof_is_tried_again_after_its_backoff() -> None:
    trouble = Trouble(1, last_at=5.0, reason="no KV bytes arrived")
    observed = Observed(pool(p1=WARMING, d1=WARMING), failed_proofs={pair("p1", "d1"): trouble})
    assert decide(ONE_EACH, observed, now=5.5) == []
    assert kinds(decide(ONE_EACH, observed, now=6.0)) == [("prove", ("p1", "d1"))]


def test_health_names_the_missing_pool_and_why() -> None:
    assert health(Observed(pool(p1=READY, d1=READY))) == (True, "serving")
    trouble = {DECODE: Trouble(1, 0.0, "decode-1: no such model")}
    is_healthy, reason = health(Observed(pool(p1=READY), failed_starts=trouble))
    assert not is_healthy
    assert reason == "no warm decode worker; decode: decode-1: no such model"


def test_failing_means_that_a_pool_cannot_get_its_first_worker() -> None:
    trouble = {DECODE: Trouble(5, 0.0, "boom")}
    assert is_failing(Observed(pool(p1=READY), failed_starts=trouble))
    assert not is_failing(Observed(pool(p1=READY, d1=READY), failed_starts=trouble))
    assert not is_failing(Observed(pool(p1=READY)))


STATES = st.lists(st.sampled_from(list(WorkerState)), max_size=4)


@given(STATES, STATES, st.integers(1, 4), st.integers(1, 4), st.data())
def test_decisions_are_sane_in_any_state(
    prefills: list[WorkerState],
    decodes: list[WorkerState],
    want_p: int,
    want_d: int,
    data: st.DataObject,
) -> None:
    workers = tuple(worker(f"p{i}", s) for i, s in enumerate(prefills))
    workers += tuple(worker(f"d{i}", s) for i, s in enumerate(decodes))
    pairs = [
        (p.worker_id, d.worker_id)
        for p in workers
        for d in workers
        if (p.role, d.role) == (PREFILL, DECODE)
    ]
    proven = data.draw(st.frozensets(st.sampled_from(pairs))) if pairs else frozenset()
    observed = Observed(workers, proven)
    desired = Desired({PREFILL: want_p, DECODE: want_d})
    states = {w.worker_id: w.state for w in workers}
    actions = decide(desired, observed, now=0.0)
    assert decide(desired, observed, now=0.0) == actions
    changed = [a.worker_id for a in actions if isinstance(a, StopWorker | Enter | TakeRole)]
    assert len(changed) == len(set(changed)), "no worker is told two things"
    assert [len(after_all(actions, workers, role)) for role in Role] == [want_p, want_d]
    for action in actions:
        if isinstance(action, Enter) and action.state is READY:
            assert states[action.worker_id] in (WARMING, HELD, WorkerState.SOFT_OUT)
        if isinstance(action, ProveHandoff):
            assert {states[w] for w in action.pair} <= {WARMING, HELD, READY}
            assert action.pair not in proven


def after_all(
    actions: list[Action], workers: tuple[ObservedWorker, ...], role: Role
) -> list[WorkerId]:
    """Return who is in a pool, or on the way there, once every action is carried out."""
    places = {w.worker_id: (w.role, w.state) for w in workers}
    for number, action in enumerate(actions):
        match action:
            case StartWorker(started, _, False):
                places[WorkerId(f"new-{number}")] = (started, PENDING)
            case Enter(worker_id, state):
                places[worker_id] = (places[worker_id][0], state)
            case TakeRole(worker_id, taken):
                places[worker_id] = (taken, WorkerState.FLIPPING)
            case StopWorker(worker_id):
                del places[worker_id]
    return [w for w, (in_role, state) in places.items() if in_role is role and state in PROVISIONED]
