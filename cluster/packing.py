"""Which nodes of one domain hold a piece of a service: its prefill and decode workers together.

Exact: if any assignment of the piece to the nodes exists, it is found. Amounts are whole numbers
of ten-thousandths, Ray's own resolution, so that sums of fractions do not drift.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.names import Role
from cluster.service import Counts, DeployGroup, PlacedWorker, RoleNeed, Service, Tenure
from cluster.topology import Node, Topology

_RESOLUTION = 10_000


@dataclass(frozen=True, slots=True)
class Amount:
    """GPUs and CPUs, in ten-thousandths."""

    gpus: int = 0
    cpus: int = 0

    def plus(self, other: "Amount", times: int = 1) -> "Amount":
        return Amount(self.gpus + other.gpus * times, self.cpus + other.cpus * times)

    def at_most(self, other: "Amount") -> "Amount":
        return Amount(min(self.gpus, other.gpus), min(self.cpus, other.cpus))

    def covers(self, need: "Amount") -> bool:
        return self.gpus >= need.gpus and self.cpus >= need.cpus

    def holds(self, need: "Amount") -> int:
        """Return how many times `need` fits."""
        times = max(0, self.cpus // need.cpus)
        return min(times, max(0, self.gpus // need.gpus)) if need.gpus else times

    def __str__(self) -> str:
        return f"{self.gpus / _RESOLUTION:g} GPUs and {self.cpus / _RESOLUTION:g} CPUs"


# What each node has to give.
Free = dict[str, Amount]


def amount(gpus: float, cpus: float) -> Amount:
    return Amount(round(gpus * _RESOLUTION), round(cpus * _RESOLUTION))


def amount_of(need: RoleNeed) -> Amount:
    """Return what one worker takes."""
    return amount(need.gpus_per_worker, need.cpus_per_worker)


@dataclass(frozen=True, slots=True)
class Slot:
    """One worker's place."""

    role: Role
    node_id: str


class Room:
    """What the nodes have left: `free` in this cycle, `soon` once leaving workers are gone.

    Nodes with a fault have nothing.
    """

    def __init__(self, topology: Topology, groups: Iterable[DeployGroup]) -> None:
        usable = [node for node in topology.nodes.values() if node.fault is None]
        self.free: Free = {node.id: amount(node.free_gpus, node.free_cpus) for node in usable}
        self.soon: Free = dict(self.free)
        for group in groups:
            for worker in group.workers:
                if worker.tenure is Tenure.CLAIMED:
                    self.take(group.service, [Slot(worker.role, worker.node_id)])
                elif worker.tenure is Tenure.LEAVING:
                    give_back(self.soon, group.service, [worker])

    def take(self, service: Service, slots: Iterable[Slot]) -> None:
        """Deduct workers that are placed."""
        for slot in slots:
            need = amount_of(service.need(slot.role))
            for view in (self.free, self.soon):
                if slot.node_id in view:
                    view[slot.node_id] = view[slot.node_id].plus(need, -1)

    def promise(self, service: Service, slots: Iterable[Slot]) -> None:
        """Deduct workers from what is to come, and keep others from what they need of it."""
        for slot in slots:
            need = amount_of(service.need(slot.role))
            self.soon[slot.node_id] = self.soon[slot.node_id].plus(need, -1)
            self.free[slot.node_id] = self.free[slot.node_id].at_most(self.soon[slot.node_id])


def give_back(free: Free, service: Service, workers: Iterable[PlacedWorker], sign: int = 1) -> None:
    """Add to `free` what `workers` hold on its nodes; with `sign` -1, take it again."""
    for worker in workers:
        if worker.node_id in free:
            need = amount_of(service.need(worker.role))
            free[worker.node_id] = free[worker.node_id].plus(need, sign)


@dataclass(frozen=True, slots=True)
class Spot:
    """A node, and which roles may go there."""

    node: Node
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True)
class _Step:
    """One node's part in packing: `beside[k]` decode workers fit beside k prefill workers, and
    `before[k]` fit beside k prefill workers on the nodes before this one."""

    node_id: str
    beside: tuple[int, ...]
    before: dict[int, int]


class Packing:
    """Packs pieces of `service` into `spots`, as few and as early ones as hold a piece.

    `free` is only read, and must only shrink while the packing is in use: spots that are full
    are forgotten.
    """

    def __init__(self, service: Service, spots: Iterable[Spot], free: Free) -> None:
        self._prefill, self._decode = amount_of(service.prefill), amount_of(service.decode)
        self._spots = deque(spots)
        self._free = free

    def pack(self, piece: Counts) -> tuple[Slot, ...] | None:
        """Return a slot for each worker of `piece`, None if it does not fit."""
        self._forget_full_spots()
        steps: list[_Step] = []
        reach = {0: 0}
        for spot in self._spots:
            beside = self._beside(spot, piece)
            if beside == (0,):
                continue
            steps.append(_Step(spot.node.id, beside, reach))
            reach = _extend(reach, beside, piece)
            if reach.get(piece.prefill) == piece.decode:
                return tuple(_assign(steps, piece))
        return None

    def _forget_full_spots(self) -> None:
        while self._spots and self._beside(self._spots[0], Counts(1, 1)) == (0,):
            self._spots.popleft()

    def _beside(self, spot: Spot, piece: Counts) -> tuple[int, ...]:
        """Return how many decode workers fit beside 0, 1, 2... prefill workers on one node."""
        free = self._free[spot.node.id]
        num_prefill = 0
        if Role.PREFILL in spot.roles:
            num_prefill = min(piece.prefill, free.holds(self._prefill))
        if Role.DECODE not in spot.roles:
            return (0,) * (num_prefill + 1)
        return tuple(
            min(piece.decode, free.plus(self._prefill, -k).holds(self._decode))
            for k in range(num_prefill + 1)
        )


def _extend(reach: dict[int, int], beside: tuple[int, ...], piece: Counts) -> dict[int, int]:
    """Return, per number of prefill workers, the most decode workers that fit as well, with one
    more node."""
    extended: dict[int, int] = {}
    for num_prefill, num_decode in reach.items():
        for more_prefill, more_decode in enumerate(beside[: piece.prefill - num_prefill + 1]):
            reached = min(piece.decode, num_decode + more_decode)
            key = num_prefill + more_prefill
            extended[key] = max(extended.get(key, 0), reached)
    return extended


def _assign(steps: Sequence[_Step], piece: Counts) -> Iterator[Slot]:
    """Walk back through `steps`, giving each node only what those before it cannot hold."""
    left = piece
    for step in reversed(steps):
        here = _fewest(step, left)
        left -= here
        for role in Role:
            yield from (Slot(role, step.node_id) for _ in range(here.of(role)))


def _fewest(step: _Step, left: Counts) -> Counts:
    for num_prefill, num_decode in enumerate(step.beside):
        before = step.before.get(left.prefill - num_prefill)
        if before is not None and before + num_decode >= left.decode:
            return Counts(num_prefill, max(0, left.decode - before))
    raise AssertionError(f"{left} do not fit where they did")
