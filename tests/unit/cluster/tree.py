"""Clusters and services for the tests of placement, and what any plan must obey."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from cluster.names import Role, WorkerId
from cluster.packing import Slot
from cluster.placement import Direction, Plan, Request, cycle
from cluster.service import (
    Counts,
    DeployGroup,
    PlacedWorker,
    RoleNeed,
    Service,
    Tenure,
    deploy_groups,
)
from cluster.shortage import Cause
from cluster.topology import Node, Topology

PREFILL, DECODE = Role.PREFILL, Role.DECODE
ONE_GPU = RoleNeed(cpus_per_worker=1, gpus_per_worker=1)


def node(path: str, gpu_type: str | None = "A", gpus: int = 4, free: int | None = None) -> Node:
    """Return a node named by its switches and itself, as "s2/s1/n1", with plenty of CPUs."""
    s2, s1, _ = path.split("/")
    gpus = gpus if gpu_type else 0
    left = gpus if free is None else free
    return Node(path, 64, 64, gpus, left, gpu_type, s1=s1, s2=s2)


def mixed_cluster() -> Topology:
    """Return one pod of each subgroup class, two S1 switches each: "homo", "het", "s1het"."""
    return Topology(
        [
            *(node(f"homo/{s1}/{n}") for s1 in "ab" for n in "12"),
            *(node(f"het/{s1}/{n}", t) for s1, t in zip("ab", "AB", strict=True) for n in "12"),
            *(node(f"s1het/{s1}/{t}", t) for s1 in "ab" for t in "AB"),
        ]
    )


def service(
    name: str = "chat",
    prefill: RoleNeed = ONE_GPU,
    decode: RoleNeed = ONE_GPU,
    **settings: object,
) -> Service:
    return Service(name, prefill, decode, **settings)  # type: ignore[arg-type]


def workers(
    role: Role,
    places: Mapping[str, int] | str,
    tenure: Tenure = Tenure.HELD,
    prefix: str = "",
) -> list[PlacedWorker]:
    """Return workers of `role`, this many per node; named after their nodes."""
    counted = {places: 1} if isinstance(places, str) else places
    return [
        PlacedWorker(WorkerId(f"{prefix}{role[0]}{index}@{place}"), role, place, tenure)
        for place, num_workers in counted.items()
        for index in range(num_workers)
    ]


def out(owner: Service, prefill: int, decode: int) -> Request:
    return Request(Direction.OUT, owner, Counts(prefill, decode))


def scale_in(owner: Service, prefill: int, decode: int) -> Request:
    return Request(Direction.IN, owner, Counts(prefill, decode))


def place(tree: Topology, *requests: Request, groups: tuple[DeployGroup, ...] = ()) -> Plan:
    return cycle(tree, groups, requests)


def running(tree: Topology, owner: Service, *found: list[PlacedWorker]) -> tuple[DeployGroup, ...]:
    return deploy_groups(tree, owner, [worker for each in found for worker in each])


def why(plan: Plan) -> tuple[Cause, str]:
    (unplaced,) = plan.unplaced
    return unplaced.cause, unplaced.reason


def started(plan: Plan) -> Counts:
    """Return how many workers the plan starts."""
    return Counts.count(slot.role for each in plan.placements for slot in each.slots)


def domains(plan: Plan) -> list[str]:
    return [placement.domain for placement in plan.placements]


def after(
    topology: Topology, groups: Sequence[DeployGroup], plan: Plan, services: Iterable[Service]
) -> tuple[Topology, dict[str, list[PlacedWorker]]]:
    """Return the cluster, and each service's workers, once `plan` is carried out to the end."""
    by_name = {each.name: each for each in services}
    gone = {v.worker_id for v in plan.victims} | {w for d in plan.degradations for w in d.victims}
    staying: dict[str, list[PlacedWorker]] = defaultdict(list)
    used: Counter[str] = Counter()
    cpus: Counter[str] = Counter()

    def count(owner: Service, role: Role, node_id: str, sign: int) -> None:
        used[node_id] += sign * int(owner.need(role).gpus_per_worker)
        cpus[node_id] += sign * int(owner.need(role).cpus_per_worker)

    for group in groups:
        for worker in group.workers:
            if worker.worker_id in gone or worker.tenure is Tenure.LEAVING:
                count(group.service, worker.role, worker.node_id, -1)
            else:
                staying[group.service.name].append(worker)
    for placement in plan.placements:
        for slot in placement.slots:
            count(by_name[placement.service], slot.role, slot.node_id, 1)
            found = staying[placement.service]
            name = WorkerId(f"{placement.service}-new{len(found)}")
            found.append(PlacedWorker(name, slot.role, slot.node_id))
    return Topology(_less(topology, used, cpus)), staying


def _less(topology: Topology, gpus: Mapping[str, int], cpus: Mapping[str, int]) -> list[Node]:
    return [
        Node(
            old.id,
            old.cpus,
            old.free_cpus - cpus[old.id],
            old.gpus,
            old.free_gpus - gpus[old.id],
            old.gpu_type,
            s1=old.s1,
            s2=old.s2,
        )
        for old in topology.nodes.values()
    ]


def slots_per_node(plan: Plan) -> Counter[Slot]:
    return Counter(slot for placement in plan.placements for slot in placement.slots)
