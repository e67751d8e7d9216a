"""What every plan obeys, on random small clusters, against an oracle that tries everything."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.names import Role
from cluster.placement import Direction, Plan, Request, cycle
from cluster.service import Counts, DeployGroup, RoleNeed, Service, deploy_groups
from cluster.shortage import Cause
from cluster.topology import Level, Node, SubgroupClass, Topology
from tests.unit.cluster.tree import after, node, service, started, workers

GPUS = 3
Free = dict[str, int]

TYPES = st.sampled_from([("A",), ("B",), ("A", "B"), ("B", "A"), ()])
NEEDS = st.builds(RoleNeed, st.just(1), st.integers(1, 2), TYPES)
RATIOS = st.builds(Counts, st.integers(1, 2), st.integers(1, 2))
SIZES = st.builds(Counts, st.integers(0, 4), st.integers(0, 4))
AFFINITIES = st.sampled_from(list(Level))


@st.composite
def trees(draw: st.DrawFn) -> Topology:
    """Draw up to five nodes under two pods of two S1 switches, each with some GPUs in use."""
    kinds = st.tuples(
        st.sampled_from("pq"), st.sampled_from("ab"), st.sampled_from("AB"), st.integers(0, GPUS)
    )
    drawn = draw(st.lists(kinds, min_size=1, max_size=5))
    return Topology(
        node(f"{s2}/{s1}/{index}", kind, GPUS, free)
        for index, (s2, s1, kind, free) in enumerate(drawn)
    )


@st.composite
def fleets(draw: st.DrawFn, min_units: int) -> list[Service]:
    """Draw one to three services of different priorities."""
    return [
        service(
            name,
            prefill=draw(NEEDS),
            decode=draw(NEEDS),
            ratio=draw(RATIOS),
            affinity=draw(AFFINITIES),
            priority=priority,
            min_units=min_units,
        )
        for priority, name in enumerate("abc"[: draw(st.integers(1, 3))])
    ]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Topology, tuple[DeployGroup, ...], list[Request]]:
    """Draw services that run a few workers already and each want to grow or shrink; none may be
    shrunk for another."""
    tree = draw(trees())
    groups: list[DeployGroup] = []
    requests = []
    for owner in draw(fleets(min_units=99)):
        places = st.dictionaries(st.sampled_from(sorted(tree.nodes)), st.integers(1, 2), max_size=2)
        found = [w for role in Role for w in workers(role, draw(places), prefix=owner.name)]
        groups += deploy_groups(tree, owner, found)
        requests.append(Request(draw(st.sampled_from(Direction)), owner, draw(SIZES)))
    return tree, tuple(groups), requests


def taken(owner: Service, slots: Iterable[tuple[Role, str]]) -> Free:
    gpus: Free = defaultdict(int)
    for role, node_id in slots:
        gpus[node_id] += int(owner.need(role).gpus_per_worker)
    return gpus


def fits(owner: Service, piece: Counts, nodes: Sequence[Node], free: Mapping[str, int]) -> bool:
    """Return whether any assignment of `piece` to `nodes` fits into `free`: try all of them."""
    left = dict(free)

    def put(role: Role, num_left: int, then: Sequence[tuple[Role, int]]) -> bool:
        if not num_left:
            return put(*then[0], then[1:]) if then else True
        for each in nodes:
            gpus = int(owner.need(role).gpus_per_worker)
            if owner.need(role).rank(each.gpu_type) is None or left[each.id] < gpus:
                continue
            left[each.id] -= gpus
            if put(role, num_left - 1, then):
                return True
            left[each.id] += gpus
        return False

    return put(Role.PREFILL, piece.prefill, [(Role.DECODE, piece.decode)])


def free_gpus(tree: Topology) -> Free:
    return {name: int(each.free_gpus) for name, each in tree.nodes.items()}


@given(scenes())
def test_plans_obey_the_rules(
    scene: tuple[Topology, tuple[DeployGroup, ...], list[Request]],
) -> None:
    tree, groups, requests = scene
    plan = cycle(tree, groups, requests)
    assert cycle(tree, groups, requests) == plan
    services = {request.service.name: request.service for request in requests}
    _nothing_is_overcommitted_nor_given_away_twice(tree, plan, services)
    _units_stay_whole(tree, plan, services)
    _everything_asked_for_is_answered(groups, plan, requests)
    # Nobody may be shrunk and nobody is leaving but by this very plan.
    assert not plan.degradations


def _nothing_is_overcommitted_nor_given_away_twice(
    tree: Topology, plan: Plan, services: Mapping[str, Service]
) -> None:
    """What victims hold is still theirs: placements fit into what was free at the start."""
    free = free_gpus(tree)
    for placement in plan.placements:
        slots = [(slot.role, slot.node_id) for slot in placement.slots]
        for node_id, gpus in taken(services[placement.service], slots).items():
            free[node_id] -= gpus
    assert all(left >= 0 for left in free.values())


def _units_stay_whole(tree: Topology, plan: Plan, services: Mapping[str, Service]) -> None:
    for placement in plan.placements:
        owner = services[placement.service]
        homes = {tree.nodes[slot.node_id].domain(owner.affinity) for slot in placement.slots}
        assert homes == {placement.domain}
        for slot in placement.slots:
            assert owner.need(slot.role).rank(tree.nodes[slot.node_id].gpu_type) is not None


def _everything_asked_for_is_answered(
    groups: Sequence[DeployGroup], plan: Plan, requests: Sequence[Request]
) -> None:
    roles = {worker.worker_id: worker.role for group in groups for worker in group.workers}
    assert len({victim.worker_id for victim in plan.victims}) == len(plan.victims)
    for request in requests:
        name = request.service.name
        found = [each for each in plan.unplaced if each.service == name]
        assert len(found) <= 1 and all(each.reason and each.size for each in found)
        missing = found[0].size if found else Counts()
        added = [s.role for p in plan.placements if p.service == name for s in p.slots]
        stopped = [roles[v.worker_id] for v in plan.victims if v.service == name]
        done = added if request.direction is Direction.OUT else stopped
        assert Counts.count(done) + missing == request.size
        assert not (added and stopped)


@given(trees(), fleets(min_units=99), st.lists(SIZES, min_size=3, max_size=3))
def test_the_least_valuable_domain_that_fits(
    tree: Topology, fleet: list[Service], sizes: list[Counts]
) -> None:
    """Replay the plan: no unit could have gone whole to less valuable nodes, and what was left
    out for want of room fits nowhere."""
    services = {owner.name: owner for owner in fleet}
    requests = [Request(Direction.OUT, *pair) for pair in zip(fleet, sizes, strict=False)]
    plan = cycle(tree, (), requests)
    free = free_gpus(tree)
    for placement in plan.placements:
        owner = services[placement.service]
        piece = Counts.count(slot.role for slot in placement.slots)
        if piece.prefill and piece.decode:
            value = max(tree.value(slot.node_id) for slot in placement.slots)
            assert not _fits_below(tree, owner, piece, free, value)
        slots = [(slot.role, slot.node_id) for slot in placement.slots]
        for node_id, gpus in taken(owner, slots).items():
            free[node_id] -= gpus
    for each in plan.unplaced:
        owner = services[each.service]
        if each.cause is Cause.NO_ROOM and each.size.units(owner.ratio):
            assert not any(
                fits(owner, owner.ratio, nodes, free)
                for nodes in tree.domains(owner.affinity).values()
            )


def _fits_below(
    tree: Topology, owner: Service, piece: Counts, free: Free, value: SubgroupClass
) -> bool:
    cheaper = (
        [each for each in nodes if tree.value(each.id) < value]
        for nodes in tree.domains(owner.affinity).values()
    )
    return any(fits(owner, piece, nodes, free) for nodes in cheaper)


@given(trees(), fleets(min_units=1), SIZES, st.data())
def test_degradation_helps_and_leaves_the_minimum(
    tree: Topology, fleet: list[Service], size: Counts, data: st.DataObject
) -> None:
    """Fill the cluster, let a service of higher priority come, carry out both plans."""
    filled = cycle(tree, (), [Request(Direction.OUT, owner, Counts(4, 4)) for owner in fleet])
    tree, staying = after(tree, (), filled, fleet)
    groups = [g for owner in fleet for g in deploy_groups(tree, owner, staying[owner.name])]
    urgent = service(
        "urgent", data.draw(NEEDS), data.draw(NEEDS), priority=9, affinity=data.draw(AFFINITIES)
    )
    request = Request(Direction.OUT, urgent, size)
    plan = cycle(tree, groups, [request])
    sizes = {name: Counts.count(w.role for w in found) for name, found in staying.items()}
    for owner, each in itertools.product(fleet, plan.degradations):
        if owner.name == each.service:
            assert each.size == owner.ratio and each.in_favour_of == "urgent"
            sizes[owner.name] -= owner.ratio
            assert sizes[owner.name].units(owner.ratio) >= owner.min_units
    later, left = after(tree, groups, plan, [*fleet, urgent])
    if plan.degradations:
        (unplaced,) = plan.unplaced
        assert unplaced.cause in (Cause.LEAVING, Cause.SERVICE_TOO_LARGE)
        again = Request(Direction.OUT, urgent, unplaced.size)
        mine = deploy_groups(later, urgent, left["urgent"])
        assert started(cycle(later, mine, [again]))
