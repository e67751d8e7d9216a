"""Graceful degradation: whom to shrink so that a service of higher priority finds room.

Whole ratio units go, of the lowest priority first and never below a service's `min_units`, and
only where that makes room for the piece at hand. Units that turn out not to be needed are spared,
those of the highest priority first, as Kubernetes' scheduler does.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.candidates import Search
from cluster.names import Role
from cluster.packing import Free, Slot, give_back
from cluster.service import Counts, DeployGroup, PlacedWorker, Service
from cluster.topology import Topology

# The workers of a group that stay, as the cycle knows it at this moment.
Staying = Callable[[DeployGroup], Sequence[PlacedWorker]]


@dataclass(frozen=True, slots=True)
class Eviction:
    """One ratio unit of a group to stop."""

    group: DeployGroup
    workers: tuple[PlacedWorker, ...]


@dataclass(frozen=True, slots=True)
class Nomination:
    """Where a piece will go once `evictions` and the workers that leave anyway are gone."""

    slots: tuple[Slot, ...]
    evictions: tuple[Eviction, ...]


class Preemption:
    """Makes room for pieces of one service at the expense of those of lower priority."""

    def __init__(
        self, topology: Topology, service: Service, groups: Iterable[DeployGroup], staying: Staying
    ) -> None:
        self._topology = topology
        self._service = service
        self._staying = staying
        lower = [group for group in groups if group.service.priority < service.priority]
        self._lower = sorted(lower, key=self._shrink_order)
        self._nearby = self._by_domain()
        self._domain_values = {
            domain: (max(topology.value(node.id) for node in nodes), domain)
            for domain, nodes in topology.domains(service.affinity).items()
        }
        self._spare_units = self._count_spare_units()
        self._hopeless: set[str] = set()

    def nominate(self, piece: Counts, domains: Collection[str], soon: Free) -> Nomination | None:
        """Return a place for `piece` in one of `domains` and who has to go for it, None if
        shrinking others makes no room.

        `soon` is what is free once leaving workers are gone; the caller deducts the place from
        it, and adds what the evicted hold. One instance serves one kind of piece.
        """
        for domain in sorted(domains, key=self._domain_values.__getitem__):
            if domain in self._hopeless or not self._nearby[domain]:
                continue
            if found := self._in_domain(domain, piece, soon):
                for eviction in found.evictions:
                    self._spare_units[eviction.group.service.name] -= 1
                return found
            self._hopeless.add(domain)
        return None

    def _shrink_order(self, group: DeployGroup) -> tuple[int, int, str, str]:
        value = max((self._value(worker) for worker in group.workers), default=0)
        return group.service.priority, -value, group.service.name, group.domain

    def _by_domain(self) -> dict[str, list[DeployGroup]]:
        """Return, per domain of the service's affinity, the groups with workers there."""
        nearby: dict[str, list[DeployGroup]] = defaultdict(list)
        for group in self._lower:
            nodes = (self._topology.nodes[worker.node_id] for worker in group.workers)
            for domain in sorted({node.domain(self._service.affinity) for node in nodes}):
                nearby[domain].append(group)
        return nearby

    def _value(self, worker: PlacedWorker) -> int:
        return self._topology.value(worker.node_id)

    def _in_domain(self, domain: str, piece: Counts, soon: Free) -> Nomination | None:
        nodes = self._topology.domains(self._service.affinity)[domain]
        free = {node.id: soon[node.id] for node in nodes if node.id in soon}
        # What earlier evictions left over may do.
        if slots := self._place(piece, domain, free):
            return Nomination(slots, ())
        evictions: list[Eviction] = []
        for eviction in self._evictions(domain, free):
            give_back(free, eviction.group.service, eviction.workers)
            evictions.append(eviction)
            if self._place(piece, domain, free):
                return self._spare(evictions, piece, domain, free)
        return None

    def _place(self, piece: Counts, domain: str, free: Free) -> tuple[Slot, ...] | None:
        return Search(self._topology, self._service, free).place(piece, [domain])

    def _spare(
        self, evictions: Sequence[Eviction], piece: Counts, domain: str, free: Free
    ) -> Nomination:
        """Take back evictions that `piece` does not need."""
        needed: list[Eviction] = []
        for eviction in reversed(evictions):
            give_back(free, eviction.group.service, eviction.workers, sign=-1)
            if not self._place(piece, domain, free):
                give_back(free, eviction.group.service, eviction.workers)
                needed.append(eviction)
        slots = self._place(piece, domain, free)
        assert slots is not None, "spared too much"
        return Nomination(slots, tuple(needed))

    def _evictions(self, domain: str, free: Free) -> Iterator[Eviction]:
        """Yield units that hold something on the nodes of `free`."""
        spare = dict(self._spare_units)
        for group in self._nearby[domain]:
            name = group.service.name
            for workers in self._units(group, free):
                if not spare[name] or not any(worker.node_id in free for worker in workers):
                    break
                spare[name] -= 1
                yield Eviction(group, workers)

    def _count_spare_units(self) -> dict[str, int]:
        """Return how many units each service of lower priority can lose."""
        sizes: dict[str, Counts] = defaultdict(Counts)
        for group in self._lower:
            sizes[group.service.name] += Counts.count(w.role for w in self._staying(group))
        services = {group.service.name: group.service for group in self._lower}
        return {
            name: max(0, sizes[name].units(service.ratio) - service.min_units)
            for name, service in services.items()
        }

    def _units(self, group: DeployGroup, free: Free) -> Iterator[tuple[PlacedWorker, ...]]:
        """Yield the whole units of `group`, made of workers on the nodes of `free` first, and
        those node by node, so that nodes come free as a whole."""
        staying = sorted(
            self._staying(group),
            key=lambda w: (w.node_id not in free, w.node_id, w.loss, w.worker_id),
        )
        ratio = group.service.ratio
        by_role = {role: [w for w in staying if w.role is role] for role in Role}
        for unit in range(Counts.count(w.role for w in staying).units(ratio)):
            yield tuple(
                worker
                for role in Role
                for worker in by_role[role][unit * ratio.of(role) : (unit + 1) * ratio.of(role)]
            )
