"""`make bench-placement`: how long a placement cycle over 10,000 GPUs takes.

Cycles on one cluster of 1,250 nodes: all services arrive at an empty cluster; every one of them
scales on a full one; a service of higher priority arrives there and others shrink. CPU time,
which is the wall time on a core of its own: a cycle waits for nothing.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.names import Role, WorkerId
from cluster.placement import Direction, Plan, Request, cycle
from cluster.service import Counts, DeployGroup, PlacedWorker, RoleNeed, Service, deploy_groups
from cluster.topology import Level, Node, Topology
from tests.benchmarks.sections import table, write_section

NUM_NODES, GPUS_PER_NODE, CPUS_PER_NODE = 1250, 8, 128
NODES_PER_S1, S1_PER_S2 = 16, 8
NUM_SERVICES = 50
LIMIT_S = 1.0
RATIOS = (Counts(1, 1), Counts(2, 1), Counts(1, 3), Counts(9, 7))


@dataclass(frozen=True)
class Scene:
    """The arguments of one cycle."""

    name: str
    topology: Topology
    groups: tuple[DeployGroup, ...]
    requests: tuple[Request, ...]


def nodes() -> list[Node]:
    """Return 10,000 GPUs of two types, in pods of all three subgroup classes."""
    return [_node(index) for index in range(NUM_NODES)]


def _node(index: int) -> Node:
    s1 = index // NODES_PER_S1
    s2 = s1 // S1_PER_S2
    # By turns: one type in the whole pod, one type per S1 switch, one type per node.
    kind = (s2 // 3, s1, index)[s2 % 3]
    gpu_type = ("H20", "L20")[kind % 2]
    return Node(
        id=f"n{index}",
        cpus=CPUS_PER_NODE,
        free_cpus=CPUS_PER_NODE,
        gpus=GPUS_PER_NODE,
        free_gpus=GPUS_PER_NODE,
        gpu_type=gpu_type,
        s1=f"s1-{s1}",
        s2=f"s2-{s2}",
    )


def services(rng: random.Random) -> list[Service]:
    """Return services of every affinity, ratio and worker size."""
    return [
        Service(
            name=f"service-{index}",
            prefill=RoleNeed(4, rng.choice((1, 2, 4)), ("L20", "H20")),
            decode=RoleNeed(4, rng.choice((1, 2, 8)), ("H20", "L20")),
            ratio=rng.choice(RATIOS),
            priority=rng.randrange(4),
            affinity=rng.choice(tuple(Level)),
        )
        for index in range(NUM_SERVICES)
    ]


def _outs(found: Sequence[Service], gpus: float) -> tuple[Request, ...]:
    """Ask for about `gpus` GPUs, the same number for every service."""
    requests = []
    for service in found:
        per_unit = sum(service.ratio.of(role) * service.need(role).gpus_per_worker for role in Role)
        units = round(gpus / len(found) / per_unit)
        requests.append(Request(Direction.OUT, service, service.ratio * max(1, units)))
    return tuple(requests)


def arrival(rng: random.Random) -> Scene:
    requests = _outs(services(rng), gpus=NUM_NODES * GPUS_PER_NODE)
    return Scene("50 services arrive, empty cluster", Topology(nodes()), (), requests)


def _filled(scene: Scene) -> tuple[Topology, tuple[DeployGroup, ...]]:
    """Return the cluster after the cycle of `scene` has been carried out."""
    plan = cycle(scene.topology, scene.groups, scene.requests)
    by_name = {request.service.name: request.service for request in scene.requests}
    workers: dict[str, list[PlacedWorker]] = {name: [] for name in by_name}
    left = dict(scene.topology.nodes)
    for placement in plan.placements:
        for slot in placement.slots:
            need, node = by_name[placement.service].need(slot.role), left[slot.node_id]
            left[node.id] = replace(
                node,
                free_gpus=node.free_gpus - need.gpus_per_worker,
                free_cpus=node.free_cpus - need.cpus_per_worker,
            )
            ours = workers[placement.service]
            worker_id = WorkerId(f"{placement.service}-{len(ours)}")
            ours.append(PlacedWorker(worker_id, slot.role, node.id))
    topology = Topology(left.values())
    groups = (deploy_groups(topology, by_name[name], found) for name, found in workers.items())
    return topology, tuple(group for each in groups for group in each)


def rescaling(rng: random.Random) -> Scene:
    before = arrival(rng)
    topology, groups = _filled(before)
    requests = [
        Request(rng.choice(tuple(Direction)), request.service, request.service.ratio * 2)
        for request in before.requests
    ]
    return Scene("50 services scale, full cluster", topology, groups, tuple(requests))


def preemption(rng: random.Random, affinity: Level) -> Scene:
    topology, groups = _filled(arrival(rng))
    need = RoleNeed(4, 8, ("H20", "L20"))
    service = Service("urgent", need, need, Counts(1, 2), priority=9, affinity=affinity)
    requests = (Request(Direction.OUT, service, Counts(20, 40)),)
    name = f"480 GPUs by priority, affinity {affinity}, full cluster"
    return Scene(name, topology, groups, requests)


def measure(scene: Scene, rounds: int) -> tuple[list[float], Plan]:
    """Return the CPU seconds of each round; as in the controller, each builds the tree anew."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        plan = cycle(Topology(scene.topology.nodes.values()), scene.groups, scene.requests)
        seconds.append(time.process_time() - began)
    return seconds, plan


def _row(scene: Scene, seconds: Sequence[float], plan: Plan) -> list[object]:
    placed = sum(len(placement.slots) for placement in plan.placements)
    stopped = len(plan.victims) + sum(d.size.total for d in plan.degradations)
    unplaced = sum(each.size.total for each in plan.unplaced)
    median, most = statistics.median(seconds), max(seconds)
    return [scene.name, placed, stopped, unplaced, f"{median:.3f} s", f"{most:.3f} s"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rng = random.Random(3)
    scenes = [arrival(rng), rescaling(rng), *(preemption(rng, level) for level in Level)]
    rows, slowest = [], 0.0
    for scene in scenes:
        seconds, plan = measure(scene, rounds)
        slowest = max(slowest, *seconds)
        rows.append(_row(scene, seconds, plan))
    header = ("cycle", "workers placed", "workers stopped", "not placed", "median", "longest")
    body = (
        f"A placement cycle over {NUM_NODES * GPUS_PER_NODE:,} GPUs, CPU time; limit {LIMIT_S:g} s,"
        f" slowest {slowest:.3f} s\n\n{table(header, rows)}"
    )
    write_section("placement", "make bench-placement", body)
    return 0 if slowest < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
