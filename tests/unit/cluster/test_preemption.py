"""A service of higher priority arrives: who is shrunk, and who is not."""

from cluster.names import Role
from cluster.service import (
    Counts,
    DeployGroup,
    RoleNeed,
    Service,
    Tenure,
)
from cluster.shortage import Cause
from cluster.topology import Level, Topology
from tests.unit.cluster.tree import (
    DECODE,
    ONE_GPU,
    PREFILL,
    after,
    node,
    out,
    place,
    running,
    service,
    started,
    why,
    workers,
)


def busy_pod(min_units: int = 1) -> tuple[Topology, Service, tuple[DeployGroup, ...]]:
    """Return a full pod: "batch" runs 2P2D on each of two nodes."""
    tree = Topology([node("p/a/1", free=0), node("p/a/2", free=0)])
    batch = service("batch", min_units=min_units)
    nodes = {"p/a/1": 2, "p/a/2": 2}
    return tree, batch, running(tree, batch, workers(PREFILL, nodes), workers(DECODE, nodes))


def test_higher_priority_shrinks_lower_and_is_placed_in_the_next_cycle() -> None:
    tree, batch, groups = busy_pod()
    urgent = service("urgent", priority=5)
    plan = place(tree, out(urgent, 1, 1), groups=groups)
    (degradation,) = plan.degradations
    assert (degradation.service, degradation.size) == ("batch", Counts(1, 1))
    assert degradation.reason == "urgent (priority 5) needs the room of batch (priority 0)"
    cause, reason = why(plan)
    assert cause is Cause.LEAVING
    assert reason == "1 prefill and 1 decode workers wait for workers of batch to leave"
    tree, staying = after(tree, groups, plan, [batch, urgent])
    assert Counts.count(worker.role for worker in staying["batch"]) == Counts(3, 3)
    assert started(place(tree, out(urgent, 1, 1))) == Counts(1, 1)


def test_nobody_is_shrunk_again_while_room_is_on_its_way() -> None:
    tree, batch, _ = busy_pod()
    found = [
        *workers(PREFILL, "p/a/1", Tenure.LEAVING),
        *workers(DECODE, "p/a/1", Tenure.LEAVING),
        *workers(PREFILL, "p/a/2"),
        *workers(DECODE, "p/a/2"),
    ]
    plan = place(
        tree,
        out(service("urgent", priority=5), 1, 1),
        groups=running(tree, batch, found),
    )
    assert not plan.degradations and why(plan)[0] is Cause.LEAVING


def test_room_on_its_way_to_a_higher_priority_is_not_eaten_from_below() -> None:
    """Two GPUs are free and two are coming, all four spoken for."""
    tree = Topology([node("p/a/1", free=2)])
    batch = service("batch")
    found = workers(PREFILL, {"p/a/1": 1}, Tenure.LEAVING)
    found += workers(DECODE, {"p/a/1": 1}, Tenure.LEAVING)
    urgent = service("urgent", RoleNeed(1, 2), RoleNeed(1, 2), priority=5)
    groups = running(tree, batch, found)
    plan = place(tree, out(urgent, 1, 1), out(batch, 1, 1), groups=groups)
    assert not plan.placements
    assert [each.service for each in plan.unplaced] == ["urgent", "batch"]


def test_the_minimum_is_left_to_a_service() -> None:
    tree, _, groups = busy_pod(min_units=3)
    plan = place(tree, out(service("urgent", priority=5), 2, 2), groups=groups)
    assert [each.size for each in plan.degradations] == [Counts(1, 1)]
    tree, _, groups = busy_pod(min_units=4)
    plan = place(tree, out(service("urgent", priority=5), 1, 1), groups=groups)
    assert not plan.degradations and why(plan)[0] is Cause.NO_ROOM


def test_equals_are_not_shrunk() -> None:
    tree, _, groups = busy_pod()
    plan = place(tree, out(service("equal"), 1, 1), groups=groups)
    assert not plan.degradations and why(plan)[0] is Cause.NO_ROOM


def test_nobody_is_shrunk_for_what_that_does_not_help() -> None:
    tree, _, groups = busy_pod(min_units=0)
    wide = service("wide", RoleNeed(1, 1, ("B",)), ONE_GPU, priority=5)
    plan = place(tree, out(wide, 1, 1), groups=groups)
    assert not plan.degradations and why(plan)[0] is Cause.NO_SUCH_NODE


def test_the_lowest_priority_is_shrunk_first_and_no_more_than_needed() -> None:
    tree = Topology([node("p/a/1", free=0), node("p/a/2", free=0)])
    low, middle = service("low", min_units=0), service("middle", priority=1, min_units=0)
    groups = running(tree, low, workers(PREFILL, {"p/a/1": 1}), workers(DECODE, {"p/a/2": 1}))
    mine = [workers(role, {"p/a/1": 1, "p/a/2": 1}, prefix="m") for role in Role]
    groups += running(tree, middle, *mine)
    plan = place(tree, out(service("urgent", priority=2), 1, 1), groups=groups)
    assert [each.service for each in plan.degradations] == ["low"]


def test_units_that_are_not_needed_are_spared() -> None:
    """The lowest priority goes first, but what it holds is of no use here."""
    tree = Topology([node("p/a/A", "A", free=0), node("p/a/B", "B", free=0)])
    low, middle = service("low", min_units=0), service("middle", priority=1, min_units=0)
    groups = running(tree, low, *(workers(role, {"p/a/B": 2}) for role in Role))
    groups += running(tree, middle, *(workers(role, {"p/a/A": 2}, prefix="m") for role in Role))
    need = RoleNeed(1, 1, ("A",))
    plan = place(tree, out(service("urgent", need, need, priority=2), 1, 1), groups=groups)
    assert [each.service for each in plan.degradations] == ["middle"]


def test_the_shrunk_unit_is_the_one_in_the_way() -> None:
    """A group wider than the domain that is needed gives up its workers there."""
    tree = Topology([node("p/a/1", free=0), node("p/b/1", free=0)])
    batch = service("batch", affinity=Level.S2)
    groups = running(tree, batch, *(workers(role, {"p/a/1": 2, "p/b/1": 2}) for role in Role))
    urgent = service("urgent", priority=1, affinity=Level.S1)
    plan = place(tree, out(urgent, 1, 1), groups=groups)
    assert [each.victims for each in plan.degradations] == [("p0@p/a/1", "d0@p/a/1")]


def test_what_is_left_over_of_one_eviction_serves_the_next() -> None:
    tree = Topology([node("p/a/1", free=0)])
    batch = service("batch", RoleNeed(1, 2), RoleNeed(1, 2), min_units=0)
    groups = running(tree, batch, workers(PREFILL, "p/a/1"), workers(DECODE, "p/a/1"))
    urgent, middle = service("urgent", priority=2), service("middle", priority=1)
    plan = place(tree, out(urgent, 2, 2), out(middle, 1, 1), groups=groups)
    assert [each.size for each in plan.degradations] == [Counts(1, 1)]
    assert [(each.service, each.cause) for each in plan.unplaced] == [
        ("urgent", Cause.LEAVING),
        ("middle", Cause.NO_ROOM),
    ]


def test_more_than_the_cluster_takes_what_there_is() -> None:
    tree, _, groups = busy_pod(min_units=1)
    plan = place(tree, out(service("urgent", priority=5), 9, 9), groups=groups)
    assert len(plan.degradations) == 3
    assert why(plan)[0] is Cause.SERVICE_TOO_LARGE
