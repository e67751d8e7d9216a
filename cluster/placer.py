"""Where new workers go: one placement cycle over what every deployment of the cluster needs.

Each controller writes down its service, its workers and what it lacks, reads what the others
wrote, and runs the same pure cycle (`cluster/placement.py`) over all of it. It carries out only
its own part: it starts its workers where the cycle puts them, and gives up its own where a
service of higher priority needs the room.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from cluster.controller_store import KeyValueStore
from cluster.names import Role, WorkerId
from cluster.packing import Slot
from cluster.placement import Direction, Request, cycle
from cluster.service import Counts, DeployGroup, PlacedWorker, RoleNeed, Service, Tenure
from cluster.service import deploy_groups as groups_of
from cluster.topology import Level, Node, Topology

PREFIX = "tandem-services/"
# A controller writes every few seconds; one that has stopped cannot give anything up.
STALE_S = 15.0


@dataclass(frozen=True, slots=True)
class Orders:
    """One deployment's part of a cycle: places for new workers, why others found none, its
    workers that have to go, each with the reason, and those that wait for a node that is gone."""

    slots: tuple[Slot, ...] = ()
    unplaced: tuple[str, ...] = ()
    victims: tuple[tuple[WorkerId, str], ...] = ()
    stranded: tuple[WorkerId, ...] = ()


class Placer(Protocol):
    def plan(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> Orders:
        """Return this deployment's orders; blocks on the cluster's state. `now` is Unix time."""
        ...

    def withdraw(self) -> None:
        """Forget this deployment's needs."""
        ...


@dataclass(frozen=True, slots=True)
class Needs:
    """What one deployment wrote down at Unix time `at`."""

    at: float
    service: Service
    workers: tuple[PlacedWorker, ...]
    wanted: Counts

    def as_json(self) -> bytes:
        return json.dumps(asdict(self), default=lambda tenure: tenure.name).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        document = json.loads(text)
        service = document["service"]
        return cls(
            document["at"],
            Service(
                service["name"],
                _role_need(service["prefill"]),
                _role_need(service["decode"]),
                Counts(**service["ratio"]),
                service["priority"],
                Level(service["affinity"]),
                service["min_units"],
            ),
            tuple(_placed_worker(worker) for worker in document["workers"]),
            Counts(**document["wanted"]),
        )

    def bundles(self) -> list[dict[str, float]]:
        """Return what each of the service's workers takes, those it lacks included."""
        roles = [worker.role for worker in self.workers]
        roles += [role for role in Role for _ in range(self.wanted.of(role))]
        return [bundle_of(self.service.need(role)) for role in roles]


def bundle_of(need: RoleNeed) -> dict[str, float]:
    """Return the resources of one worker under Ray's names."""
    bundle = {"CPU": need.cpus_per_worker, "GPU": need.gpus_per_worker}
    return {name: amount for name, amount in bundle.items() if amount}


def _role_need(document: Mapping[str, Any]) -> RoleNeed:
    return RoleNeed(**{**document, "gpu_types": tuple(document["gpu_types"])})


def _placed_worker(document: Mapping[str, Any]) -> PlacedWorker:
    words = {"role": Role(document["role"]), "tenure": Tenure[document["tenure"]]}
    return PlacedWorker(**{**document, **words})


class SharedPlacer:
    """Plans for `service` among all services whose needs are in `store`.

    `nodes` returns the cluster's nodes as they are; `ask_for` is given the resources of every
    worker there is and should be, whenever some have no room.
    """

    def __init__(
        self,
        service: Service,
        store: KeyValueStore,
        nodes: Callable[[], Iterable[Node]],
        ask_for: Callable[[list[dict[str, float]]], None],
    ) -> None:
        self._service = service
        self._store = store
        self._nodes = nodes
        self._ask_for = ask_for
        self._key = PREFIX + service.name
        self._is_asking = False

    def plan(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> Orders:
        own = Needs(now, self._service, tuple(workers), wanted)
        self._store.put(self._key, own.as_json())
        everyone = [own, *self._others(now)]
        topology = Topology(self._nodes())
        groups: list[DeployGroup] = []
        for needs in everyone:
            groups += groups_of(topology, needs.service, needs.workers)
        requests = [Request(Direction.OUT, n.service, n.wanted) for n in everyone if n.wanted]
        plan = cycle(topology, groups, requests)
        self._ask_for_nodes(everyone, has_unplaced=bool(plan.unplaced))
        name = self._service.name
        return Orders(
            tuple(slot for p in plan.placements if p.service == name for slot in p.slots),
            tuple(unplaced.reason for unplaced in plan.unplaced if unplaced.service == name),
            tuple((v, d.reason) for d in plan.degradations if d.service == name for v in d.victims),
            tuple(
                worker.worker_id
                for worker in workers
                if worker.tenure is Tenure.CLAIMED and worker.node_id not in topology.nodes
            ),
        )

    def withdraw(self) -> None:
        self._store.delete(self._key)

    def _others(self, now: float) -> list[Needs]:
        keys = [key for key in sorted(self._store.keys(PREFIX)) if key != self._key]
        texts = (self._store.get(key) for key in keys)
        found = [Needs.from_json(text) for text in texts if text is not None]
        return [needs for needs in found if now - needs.at < STALE_S]

    def _ask_for_nodes(self, everyone: Sequence[Needs], has_unplaced: bool) -> None:
        if has_unplaced or self._is_asking:
            self._is_asking = has_unplaced
            bundles = [bundle for needs in everyone for bundle in needs.bundles()]
            self._ask_for(bundles if has_unplaced else [])
