"""The placement cycle in scenes: where workers go, and who leaves."""

from dataclasses import replace

import pytest

from cluster.names import Role, WorkerId
from cluster.placement import pieces
from cluster.service import (
    Counts,
    PlacedWorker,
    RoleNeed,
    Tenure,
)
from cluster.shortage import Cause
from cluster.topology import Level, Topology
from tests.unit.cluster.tree import (
    DECODE,
    PREFILL,
    after,
    domains,
    mixed_cluster,
    node,
    out,
    place,
    running,
    scale_in,
    service,
    slots_per_node,
    started,
    why,
    workers,
)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((4, 2), (2, 1), [((2, 1), 2)]),
        ((5, 2), (2, 1), [((2, 1), 2), ((1, 0), 1)]),
        ((1, 1), (9, 7), [((1, 1), 1)]),
        ((3, 3), (1, 2), [((1, 2), 1), ((1, 1), 1), ((1, 0), 1)]),
        ((0, 3), (1, 1), [((0, 1), 3)]),
        ((0, 0), (1, 1), []),
    ],
)
def test_units_first_then_what_is_left(
    size: tuple[int, int], ratio: tuple[int, int], expected: list[tuple[tuple[int, int], int]]
) -> None:
    found = pieces(Counts(*size), Counts(*ratio))
    assert [((p.prefill, p.decode), times) for p, times in found] == expected


# --- scale-out


def test_the_least_valuable_domain_that_fits() -> None:
    plan = place(mixed_cluster(), out(service(), 20, 20))
    assert domains(plan) == [
        *["default/homo"] * 8,
        *["default/het"] * 8,
        *["default/s1het"] * 4,
    ]


def test_a_new_group_in_a_cheap_domain_before_a_grown_one_in_a_dear_one() -> None:
    tree, owner = mixed_cluster(), service()
    group = running(tree, owner, workers(PREFILL, "s1het/a/A"), workers(DECODE, "s1het/a/B"))
    (placement,) = place(tree, out(owner, 1, 1), groups=group).placements
    assert placement.domain == "default/homo"
    assert placement.reason == "a new group in default/homo, S2_HOMO subgroup, first-choice nodes"


def test_a_group_grows_before_another_starts_next_to_it() -> None:
    tree = Topology([node("p/a/1", free=1), node("p/a/2", free=1), node("q/a/1")])
    owner = service()
    group = running(tree, owner, workers(PREFILL, "q/a/1"), workers(DECODE, "q/a/1"))
    assert domains(place(tree, out(owner, 1, 1), groups=group)) == ["default/q"]
    assert domains(place(tree, out(owner, 1, 1))) == ["default/p"], "the tighter without a group"


@pytest.mark.parametrize(
    ("affinity", "domain"),
    [(Level.S1, None), (Level.S2, None), (Level.CLUSTER, "default")],
)
def test_a_unit_stays_in_one_domain_of_its_affinity(affinity: Level, domain: str | None) -> None:
    tree = Topology([node("p/a/1", free=1), node("q/b/1", free=1)])
    plan = place(tree, out(service(affinity=affinity), 1, 1))
    assert domains(plan) == ([domain] if domain else [])
    if not domain:
        cause, reason = why(plan)
        assert cause is Cause.NO_ROOM
        assert reason == (
            f"no {affinity} domain has room for 1 prefill and 1 decode workers:"
            " 2 GPUs and 128 CPUs free on 2 possible nodes"
        )


def test_first_choice_gpus_then_the_next() -> None:
    tree = Topology([node("p/a/1", "A", free=2), node("p/b/1", "B")])
    owner = service(
        prefill=RoleNeed(1, 1, ("A", "B")), decode=RoleNeed(1, 1, ("B", "A")), ratio=Counts(1, 1)
    )
    plan = place(tree, out(owner, 3, 3))
    kinds = [{(s.role, tree.nodes[s.node_id].gpu_type) for s in p.slots} for p in plan.placements]
    assert kinds == [
        {(PREFILL, "A"), (DECODE, "B")},
        {(PREFILL, "A"), (DECODE, "B")},
        {(PREFILL, "B"), (DECODE, "B")},
    ]
    assert [p.reason.endswith("first-choice nodes") for p in plan.placements] == [True, True, False]


def test_a_type_that_is_no_choice_is_never_taken() -> None:
    tree = Topology([node("p/a/1", "A"), node("p/b/1", "B")])
    owner = service(prefill=RoleNeed(1, 1, ("A",)), decode=RoleNeed(1, 1, ("A",)))
    plan = place(tree, out(owner, 3, 3))
    assert started(plan) == Counts(2, 2)
    assert {slot.node_id for slot in slots_per_node(plan)} == {"p/a/1"}


def test_heterogeneous_s1_for_the_service_that_needs_it() -> None:
    """Both roles want different GPUs under one S1 switch: only the dearest subgroup has that."""
    owner = service(
        prefill=RoleNeed(1, 1, ("A",)), decode=RoleNeed(1, 1, ("B",)), affinity=Level.S1
    )
    plan = place(mixed_cluster(), out(service("plain", priority=1), 8, 8), out(owner, 2, 2))
    assert not plan.unplaced
    assert set(domains(plan)) == {"default/homo", "default/s1het/a"}


def test_higher_priority_first_and_the_earlier_of_equals() -> None:
    tree = Topology([node("p/a/1")])
    low, high = service("low", min_units=0), service("high", priority=1)
    plan = place(tree, out(low, 2, 2), out(high, 1, 1), out(service("late"), 1, 1))
    assert [p.service for p in plan.placements] == ["high", "low"]
    assert [(u.service, u.size) for u in plan.unplaced] == [
        ("low", Counts(1, 1)),
        ("late", Counts(1, 1)),
    ]


def test_workers_without_gpus_leave_gpu_nodes_alone_while_they_can() -> None:
    tree = Topology([node("p/a/gpu", "A"), node("p/a/cpu", None)])
    owner = service(prefill=RoleNeed(32), decode=RoleNeed(32))
    first, second = place(tree, out(owner, 2, 2)).placements
    assert {slot.node_id for slot in first.slots} == {"p/a/cpu"}
    assert {slot.node_id for slot in second.slots} == {"p/a/gpu"}


def test_they_rather_start_a_group_than_grow_one_on_gpu_nodes() -> None:
    tree = Topology([node("p/a/gpu", "A"), node("q/a/cpu", None)])
    owner = service(prefill=RoleNeed(1), decode=RoleNeed(1))
    groups = running(tree, owner, *(workers(role, "p/a/gpu") for role in Role))
    assert domains(place(tree, out(owner, 1, 1), groups=groups)) == ["default/q"]


def test_a_placed_worker_that_ray_does_not_know_yet_is_counted() -> None:
    tree, owner = Topology([node("p/a/1", free=2)]), service()
    found = [*workers(PREFILL, "p/a/1", Tenure.CLAIMED), *workers(DECODE, "p/a/1", Tenure.CLAIMED)]
    cause, _ = why(place(tree, out(owner, 1, 1), groups=running(tree, owner, found)))
    assert cause is Cause.NO_ROOM


def test_the_cheap_part_of_a_domain_first() -> None:
    """An S2 switch over subgroups of two classes: the dearer one only when the other is full."""
    tree = Topology([node("p/a/A", "A", free=2), node("p/a/B", "B"), node("p/b/A", "A")])
    plan = place(tree, out(service(), 3, 3))
    used = [{slot.node_id for slot in placement.slots} for placement in plan.placements]
    assert used == [{"p/b/A"}, {"p/b/A"}, {"p/a/A"}]


def test_a_dear_node_does_not_complete_a_unit_that_is_cheap_elsewhere() -> None:
    """The first pod is the tighter, but the unit would need its S1_HET subgroup there."""
    dear = [node("p/a/A", "A", free=1), node("p/a/B", "B", free=0), node("p/b/A", "A", free=1)]
    tree = Topology([*dear, node("q/a/A", "A"), node("q/b/B", "B")])
    (placement,) = place(tree, out(service(), 1, 1)).placements
    assert placement.domain == "default/q" and "S2_HET subgroup" in placement.reason


# --- one role alone: replacements and ratio repair


def test_a_lost_worker_is_replaced_in_the_group_that_lacks_it() -> None:
    tree = Topology([node("p/a/1"), node("p/a/2"), node("q/a/1")])
    owner = service()
    groups = running(
        tree,
        owner,
        workers(PREFILL, {"p/a/1": 1, "q/a/1": 1}),
        workers(DECODE, {"p/a/1": 1}),
    )
    assert domains(place(tree, out(owner, 0, 1), groups=groups)) == ["default/q"]


def test_a_worker_alone_does_not_start_a_group_without_the_other_role() -> None:
    tree = Topology([node("p/a/1", free=0), node("q/a/1")])
    owner = service()
    groups = running(tree, owner, workers(PREFILL, "p/a/1"), workers(DECODE, "p/a/1"))
    cause, _ = why(place(tree, out(owner, 1, 0), groups=groups))
    assert cause is Cause.NO_ROOM
    assert started(place(tree, out(owner, 1, 0))) == Counts(1, 0), "the first one of all may"


def test_single_workers_spread_to_where_they_are_missing() -> None:
    tree = Topology([node("p/a/1", gpus=8), node("q/a/1", gpus=8)])
    owner = service()
    groups = running(
        tree,
        owner,
        workers(PREFILL, {"p/a/1": 3, "q/a/1": 2}),
        workers(DECODE, {"p/a/1": 1, "q/a/1": 1}),
    )
    plan = place(tree, out(owner, 0, 3), groups=groups)
    assert sorted(domains(plan)) == ["default/p", "default/p", "default/q"]


def test_a_worker_alone_does_not_join_a_group_without_the_other_role() -> None:
    tree, owner = Topology([node("p/a/1"), node("q/a/1", free=0)]), service()
    groups = running(
        tree, owner, workers(PREFILL, {"p/a/1": 1, "q/a/1": 1}), workers(DECODE, "q/a/1")
    )
    plan = place(tree, out(owner, 1, 0), groups=groups)
    assert why(plan) == (
        Cause.NO_ROOM,
        "no group of chat has room for 1 prefill worker:"
        " 0 GPUs and 64 CPUs free on 1 possible nodes",
    )


# --- scale-in


def test_the_most_valuable_domain_is_given_back_first() -> None:
    tree, owner = mixed_cluster(), service()
    nodes = {"homo/a/1": 2, "het/a/1": 1, "s1het/a/A": 1}
    groups = running(tree, owner, workers(PREFILL, nodes), workers(DECODE, nodes))
    plan = place(tree, scale_in(owner, 2, 2), groups=groups)
    assert [victim.worker_id for victim in plan.victims] == [
        "p0@s1het/a/A",
        "d0@s1het/a/A",
        "p0@het/a/1",
        "d0@het/a/1",
    ]
    assert plan.victims[0].reason == "in default/s1het, S1_HET subgroup"


def test_of_workers_placed_alike_the_one_with_least_to_lose_leaves() -> None:
    tree, owner = Topology([node("p/a/1")]), service()
    losses = {"cold": 0.0, "pinned": 7.0, "warm": 3.0}
    found = [
        PlacedWorker(WorkerId(f"{role}-{name}"), role, "p/a/1", loss=loss)
        for role in Role
        for name, loss in losses.items()
    ]
    plan = place(tree, scale_in(owner, 2, 2), groups=running(tree, owner, found))
    assert sorted(victim.worker_id for victim in plan.victims) == [
        "decode-cold",
        "decode-warm",
        "prefill-cold",
        "prefill-warm",
    ]


def test_a_single_worker_leaves_where_there_are_too_many() -> None:
    tree, owner = Topology([node("p/a/1"), node("q/a/1")]), service()
    groups = running(
        tree,
        owner,
        workers(PREFILL, {"p/a/1": 1, "q/a/1": 2}),
        workers(DECODE, {"p/a/1": 1, "q/a/1": 1}),
    )
    plan = place(tree, scale_in(owner, 1, 0), groups=groups)
    assert [victim.worker_id for victim in plan.victims] == ["p0@q/a/1"]


def test_more_to_stop_than_there_are() -> None:
    tree, owner = Topology([node("p/a/1")]), service()
    groups = running(tree, owner, workers(PREFILL, "p/a/1"), workers(DECODE, "p/a/1"))
    plan = place(tree, scale_in(owner, 2, 1), groups=groups)
    assert len(plan.victims) == 2
    assert why(plan) == (Cause.NO_WORKERS, "1 prefill worker more to stop than chat has")


def test_what_leaves_is_not_given_away_in_the_same_cycle() -> None:
    tree = Topology([node("p/a/1", gpus=2, free=0)])
    old, new = service("old"), service("new", priority=1)
    groups = running(tree, old, workers(PREFILL, "p/a/1"), workers(DECODE, "p/a/1"))
    plan = place(tree, out(new, 1, 1), scale_in(old, 1, 1), groups=groups)
    assert not plan.placements and not plan.degradations
    assert why(plan) == (
        Cause.LEAVING,
        "1 prefill and 1 decode workers wait for workers that are leaving",
    )
    tree, staying = after(tree, groups, plan, [old, new])
    assert not staying["old"]
    assert started(place(tree, out(new, 1, 1))) == Counts(1, 1)


def test_value_goes_before_what_is_lost() -> None:
    """Inside one group too: the dear subgroup is given back though more is lost there."""
    tree = Topology([node("p/a/A", "A"), node("p/a/B", "B"), node("p/b/A", "A")])
    owner = service()
    dear = [replace(w, loss=9) for role in Role for w in workers(role, "p/a/A")]
    groups = running(tree, owner, dear, workers(PREFILL, "p/b/A"), workers(DECODE, "p/b/A"))
    plan = place(tree, scale_in(owner, 1, 1), groups=groups)
    assert [victim.worker_id for victim in plan.victims] == ["p0@p/a/A", "d0@p/a/A"]


def test_a_single_worker_leaves_the_surplus_though_another_group_is_dearer() -> None:
    tree, owner = mixed_cluster(), service()
    groups = running(
        tree,
        owner,
        workers(PREFILL, {"s1het/a/A": 2, "homo/a/1": 4}),
        workers(DECODE, {"s1het/a/A": 2, "homo/a/2": 2}),
    )
    plan = place(tree, scale_in(owner, 1, 0), groups=groups)
    assert [victim.worker_id for victim in plan.victims] == ["p0@homo/a/1"]


def test_a_group_keeps_its_last_worker_of_a_role_while_another_can_give_one() -> None:
    tree, owner = Topology([node("p/a/1"), node("q/a/1", gpus=8)]), service(ratio=Counts(1, 2))
    groups = running(
        tree,
        owner,
        workers(PREFILL, {"p/a/1": 1, "q/a/1": 2}),
        workers(DECODE, {"p/a/1": 1, "q/a/1": 4}),
    )
    plan = place(tree, scale_in(owner, 1, 0), groups=groups)
    assert [victim.worker_id for victim in plan.victims] == ["p0@q/a/1"]


def test_a_worker_that_leaves_already_is_no_victim() -> None:
    tree, owner = Topology([node("p/a/1")]), service()
    found = [w for role in Role for w in workers(role, "p/a/1", Tenure.LEAVING)]
    plan = place(tree, scale_in(owner, 1, 1), groups=running(tree, owner, found))
    assert not plan.victims and why(plan)[0] is Cause.NO_WORKERS
