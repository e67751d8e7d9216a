"""Where new workers go: one placement cycle over what every deployment of the cluster needs.

Each controller writes down its service, its workers and what it lacks, reads what the others
wrote, and runs the same pure cycle (`cluster/placement.py`) over all of it. It carries out only
its own part: it starts its workers where the cycle puts them, and gives up its own where a
service of higher priority needs the room. They take turns, and each writes down what it was
given before the next one plans, so that no room is given away twice and nobody gives up more
than is needed.
"""

import itertools
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

from cluster.controller_store import KeyValueStore
from cluster.errors import ConfigError
from cluster.names import Role, WorkerId
from cluster.packing import Slot
from cluster.placement import Direction, Plan, Request, cycle
from cluster.service import Counts, DeployGroup, PlacedWorker, RoleNeed, Service, Tenure
from cluster.service import deploy_groups as groups_of
from cluster.shortage import Cause
from cluster.topology import Level, Node, Topology

logger = logging.getLogger(__name__)

PREFIX = "tandem-services/"
# A controller writes every few seconds; one that has stopped cannot give anything up.
STALE_S = 15.0
TURN_KEY = "tandem-placement-turn"
# A plan takes less than this; one that has not ended by then died with its controller.
TURN_S = 5.0
_TURN_POLL_S = 0.02
# A service too large for the cluster may still use what is leaving.
_MAY_WAIT = (Cause.LEAVING, Cause.SERVICE_TOO_LARGE)


@dataclass(frozen=True, slots=True)
class Orders:
    """One deployment's part of a cycle: places for new workers, why others found none, its
    workers that have to go, each with the reason, and those that wait for a node that is gone.

    `is_pressed`: a service of higher priority waits for workers that are leaving.
    `values` has the class of each node's network domain: the higher, the sooner to be freed;
    `domains` the domain's path down to the S1 switch, empty without labels.
    """

    slots: tuple[Slot, ...] = ()
    unplaced: tuple[str, ...] = ()
    victims: tuple[tuple[WorkerId, str], ...] = ()
    stranded: tuple[WorkerId, ...] = ()
    is_pressed: bool = False
    values: Mapping[str, int] = field(default_factory=dict)
    domains: Mapping[str, str] = field(default_factory=dict)


class Placer(Protocol):
    def plan(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> Orders:
        """Return this deployment's orders; blocks on the cluster's state. `now` is Unix time."""
        ...

    def record(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> None:
        """Tell the others of the workers that have been started, and what is still wanted."""
        ...

    def reconfigure(self, service: Service) -> None:
        """Plan for the same service under other terms."""
        ...

    def withdraw(self) -> None:
        """Forget this deployment's needs."""
        ...


class Inventory(Protocol):
    """The cluster as it is at this moment; calls block."""

    def nodes(self) -> Iterable[Node]: ...

    def held(self) -> Collection[str]:
        """Return the full names of workers whose resources have been taken from their nodes."""
        ...

    def ask_for(self, needs: Sequence[RoleNeed]) -> None:
        """Have the cluster grow until a worker of each of these fits beside the others."""
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

    def each(self) -> list[RoleNeed]:
        """Return what each of the service's workers takes, those it lacks included."""
        roles = [worker.role for worker in self.workers]
        roles += [role for role in Role for _ in range(self.wanted.of(role))]
        return [self.service.need(role) for role in roles]

    def seen(self, held: Collection[str]) -> tuple[PlacedWorker, ...]:
        """Return the workers, with what the cluster knows better than the one who wrote: who
        has got its resources by now, and who has given them back."""
        return tuple(
            replace(worker, tenure=Tenure.HELD)
            if worker.tenure is Tenure.CLAIMED and is_held
            else worker
            for worker in self.workers
            if (is_held := worker_name(self.service.name, worker.worker_id) in held)
            or worker.tenure is Tenure.CLAIMED
        )

    def given(self, slots: Iterable[Slot]) -> "Needs":
        """Return the needs once these slots, whose workers have no names yet, are taken."""
        claims = tuple(
            PlacedWorker(WorkerId(f"claim-{number}"), slot.role, slot.node_id, Tenure.CLAIMED)
            for number, slot in enumerate(slots)
        )
        left = self.wanted - Counts.count(claim.role for claim in claims)
        return replace(self, workers=self.workers + claims, wanted=left)


def _read(text: bytes) -> Needs | None:
    """Return what another deployment needs, None if it is of a version that we cannot read."""
    try:
        return Needs.from_json(text)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        logger.warning("ignored another deployment's needs: %r", error)
        return None


def worker_name(deployment: str, worker_id: WorkerId) -> str:
    """Return the worker's name in the cluster."""
    return f"{deployment}-{worker_id}"


def bundle_of(need: RoleNeed) -> dict[str, float]:
    """Return the resources of one worker under Ray's names."""
    bundle = {"CPU": need.cpus_per_worker, "GPU": need.gpus_per_worker}
    return {name: amount for name, amount in bundle.items() if amount}


def _role_need(document: Mapping[str, Any]) -> RoleNeed:
    return RoleNeed(**{**document, "gpu_types": tuple(document["gpu_types"])})


def _placed_worker(document: Mapping[str, Any]) -> PlacedWorker:
    words = {"role": Role(document["role"]), "tenure": Tenure[document["tenure"]]}
    return PlacedWorker(**{**document, **words})


def _cycle(topology: Topology, everyone: Sequence[Needs], held: Collection[str]) -> Plan:
    groups: list[DeployGroup] = []
    for needs in everyone:
        groups += groups_of(topology, needs.service, needs.seen(held))
    requests = [Request(Direction.OUT, n.service, n.wanted) for n in everyone if n.wanted]
    return cycle(topology, groups, requests)


class SharedPlacer:
    """Plans for `service` among all services whose needs are in `store`."""

    def __init__(self, service: Service, store: KeyValueStore, inventory: Inventory) -> None:
        self._service = service
        self._store = store
        self._inventory = inventory
        self._key = PREFIX + service.name
        self._is_asking = False

    def plan(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> Orders:
        own = Needs(now, self._service, tuple(workers), wanted)
        with self._turn(now):
            everyone = [own, *self._others(now)]
            # Before the nodes: who gets its resources in between counts twice, not never.
            held = self._inventory.held()
            topology = Topology(self._inventory.nodes())
            plan = _cycle(topology, everyone, held)
            mine = [p.slots for p in plan.placements if p.service == self._service.name]
            slots = tuple(itertools.chain.from_iterable(mine))
            self._write(own.given(slots))
        self._ask_for_nodes(everyone, has_unplaced=bool(plan.unplaced))
        return self._orders(plan, slots, own, topology, self._is_pressed(plan, everyone))

    def record(self, workers: Sequence[PlacedWorker], wanted: Counts, now: float) -> None:
        self._write(Needs(now, self._service, tuple(workers), wanted))

    def reconfigure(self, service: Service) -> None:
        self._service = service

    def withdraw(self) -> None:
        self._store.delete(self._key)

    @contextmanager
    def _turn(self, now: float) -> Iterator[None]:
        """Keep the others from planning."""
        started_s = time.monotonic()
        while not self._store.put_new(TURN_KEY, mine := self._stamp(now, started_s)):
            since = self._store.get(TURN_KEY)
            waited_s = time.monotonic() - started_s
            if since is not None and now + waited_s - float(since) > TURN_S:
                self._store.delete(TURN_KEY)
            time.sleep(_TURN_POLL_S)
        try:
            yield
        finally:
            if self._store.get(TURN_KEY) == mine:
                self._store.delete(TURN_KEY)

    def _stamp(self, now: float, started_s: float) -> bytes:
        """Return the time it is by now, which a long wait may have made much later."""
        return str(now + time.monotonic() - started_s).encode()

    def _is_pressed(self, plan: Plan, everyone: Sequence[Needs]) -> bool:
        waiting = {each.service for each in plan.unplaced if each.cause in _MAY_WAIT}
        higher = [n.service for n in everyone if n.service.priority > self._service.priority]
        return any(service.name in waiting for service in higher)

    def _orders(
        self,
        plan: Plan,
        slots: tuple[Slot, ...],
        own: Needs,
        topology: Topology,
        is_pressed: bool,
    ) -> Orders:
        name = self._service.name
        return Orders(
            slots,
            tuple(unplaced.reason for unplaced in plan.unplaced if unplaced.service == name),
            tuple((v, d.reason) for d in plan.degradations if d.service == name for v in d.victims),
            tuple(
                worker.worker_id
                for worker in own.workers
                if worker.tenure is Tenure.CLAIMED and worker.node_id not in topology.nodes
            ),
            is_pressed,
            {node_id: int(topology.value(node_id)) for node_id in topology.nodes},
            {node_id: node.network for node_id, node in topology.nodes.items()},
        )

    def _write(self, needs: Needs) -> None:
        self._store.put(self._key, needs.as_json())

    def _others(self, now: float) -> list[Needs]:
        keys = [key for key in sorted(self._store.keys(PREFIX)) if key != self._key]
        texts = (self._store.get(key) for key in keys)
        found = [_read(text) for text in texts if text is not None]
        return [needs for needs in found if needs is not None and now - needs.at < STALE_S]

    def _ask_for_nodes(self, everyone: Sequence[Needs], has_unplaced: bool) -> None:
        """Say what every worker there is and should be takes, while some have no room."""
        if has_unplaced or self._is_asking:
            self._is_asking = has_unplaced
            needs = [need for each in everyone for need in each.each()]
            self._inventory.ask_for(needs if has_unplaced else [])
