"""How pools reach their size: the cheapest action first, out and in."""

from dataclasses import replace

import pytest

from cluster.names import Role, WorkerId
from cluster.pool_size import resize
from cluster.worker_state import (
    Action,
    Desired,
    Enter,
    Observed,
    ObservedWorker,
    StartWorker,
    StopWorker,
    TakeRole,
    Trouble,
    WorkerState,
)

PREFILL, DECODE = Role.PREFILL, Role.DECODE
S = WorkerState
NOW = 1000.0


def worker(name: str, state: WorkerState, **facts: object) -> ObservedWorker:
    role = PREFILL if name.startswith("p") else DECODE
    seen = ObservedWorker(WorkerId(name), role, state, reported_role=role)
    return replace(seen, **facts)  # type: ignore[arg-type]


def sizes(prefill: int, decode: int, **rules: object) -> Desired:
    desired = Desired({PREFILL: prefill, DECODE: decode}, soft_out_s=300.0)
    return replace(desired, **rules)  # type: ignore[arg-type]


def steps(desired: Desired, *workers: ObservedWorker, now: float = NOW) -> list[str]:
    return [_step(action) for action in resize(desired, Observed(workers), now)]


def _step(action: Action) -> str:
    match action:
        case StartWorker(role, _, is_spare):
            return f"start {'spare' if is_spare else role}"
        case Enter(worker_id, state):
            return f"{worker_id} {state}"
        case TakeRole(worker_id, role):
            return f"{worker_id} becomes {role}"
        case StopWorker(worker_id):
            return f"stop {worker_id}"
    raise AssertionError(action)


def test_out_takes_the_cheapest_action_first() -> None:
    soft, standby = worker("d2", S.SOFT_OUT, since=NOW), worker("d3", S.STANDBY)
    spare_prefill = worker("p2", S.READY)
    base = (worker("p1", S.READY), worker("d1", S.READY))
    assert steps(sizes(1, 2), *base, soft, spare_prefill, standby)[0] == "d2 ready"
    assert steps(sizes(1, 2), *base, spare_prefill, standby)[0] == "p2 becomes decode"
    assert steps(sizes(1, 2, standby=1), *base, standby) == ["d3 becomes decode", "start spare"]
    assert steps(sizes(1, 2), *base) == ["start decode"]


def test_a_worker_taken_out_of_the_other_pool_is_flipped_too() -> None:
    out = worker("p2", S.SOFT_OUT, since=NOW)
    base = (worker("p1", S.READY), worker("d1", S.READY))
    assert steps(sizes(1, 2), *base, out) == ["p2 becomes decode"]
    assert steps(sizes(1, 2, can_flip=False), *base, out) == ["start decode"]


def test_a_flip_never_leaves_the_other_pool_short() -> None:
    base = (worker("p1", S.READY), worker("p2", S.READY), worker("d1", S.READY))
    assert steps(sizes(2, 2), *base) == ["start decode"]


def test_what_does_not_serve_yet_goes_first_and_at_once() -> None:
    workers = (worker("p1", S.READY), worker("d1", S.READY), worker("d2", S.STARTING))
    assert steps(sizes(1, 1), *workers) == ["stop d2"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"value": 2}, {"value": 1}),
        ({"num_held_blocks": 0}, {"num_held_blocks": 9}),
        ({"work": 10}, {"work": 20}),
    ],
    ids=["most valuable domain", "least pinned KV", "coldest cache"],
)
def test_victims(better: dict[str, int], worse: dict[str, int]) -> None:
    workers = (worker("p1", S.READY), worker("d1", S.READY, **worse))
    assert steps(sizes(1, 1), *workers, worker("d2", S.READY, **better)) == ["d2 soft_out"]
    workers = (worker("p1", S.READY), worker("d1", S.READY, **better))
    assert steps(sizes(1, 1), *workers, worker("d2", S.READY, **worse)) == ["d1 soft_out"]


def test_a_worker_taken_out_is_observed_then_drained_then_stopped() -> None:
    base = (worker("p1", S.READY), worker("d1", S.READY))
    out = worker("d2", S.SOFT_OUT, since=NOW - 299)
    assert steps(sizes(1, 1), *base, out) == []
    assert steps(sizes(1, 1), *base, replace(out, since=NOW - 300)) == ["d2 draining"]
    draining = worker("d2", S.DRAINING, since=NOW - 5, num_requests=1)
    assert steps(sizes(1, 1), *base, draining) == []
    holding = replace(draining, num_requests=0, num_held_blocks=3)
    assert steps(sizes(1, 1), *base, holding) == []
    assert steps(sizes(1, 1), *base, replace(draining, num_requests=0)) == ["stop d2"]
    assert steps(sizes(1, 1), *base, replace(draining, since=NOW - 600)) == ["stop d2"]


def test_a_drained_worker_becomes_a_standby_where_one_is_missing() -> None:
    base = (worker("p1", S.READY), worker("d1", S.READY))
    drained = worker("d2", S.DRAINING, since=NOW - 2)
    assert steps(sizes(1, 1, standby=1), *base, drained) == ["d2 standby"]
    standby = worker("d3", S.STANDBY)
    assert steps(sizes(1, 1, standby=1), *base, standby, drained) == ["stop d2"]


def test_standbys_come_after_the_pools() -> None:
    ready = (worker("p1", S.READY), worker("d1", S.READY))
    assert steps(sizes(1, 1, standby=2), *ready) == ["start spare", "start spare"]
    assert steps(sizes(1, 2, standby=2), *ready) == ["start decode"]
    coming = worker("d9", S.STARTING, is_spare=True)
    assert steps(sizes(1, 1, standby=1), *ready, coming) == []
    assert steps(sizes(1, 1), *ready, worker("d9", S.STANDBY)) == ["stop d9"]


def test_a_standby_of_another_engine_configuration_stays_out() -> None:
    workers = (worker("p1", S.READY), worker("d1", S.READY), worker("d2", S.STANDBY))
    assert steps(sizes(2, 1, can_flip=False, standby=1), *workers) == ["start prefill"]
    assert steps(sizes(1, 2, can_flip=False), *workers) == ["d2 becomes decode"]


def test_a_pool_in_trouble_still_takes_what_needs_no_start() -> None:
    trouble = {DECODE: Trouble(3, NOW, "boom")}
    workers = (worker("p1", S.READY), worker("d1", S.READY), worker("d2", S.STANDBY))
    actions = resize(sizes(1, 3), Observed(workers, failed_starts=trouble), NOW)
    assert [_step(action) for action in actions] == ["d2 becomes decode"]
