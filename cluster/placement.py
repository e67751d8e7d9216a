"""The placement cycle: which nodes new workers go to, and which workers leave.

Pure and stateless: the tree, the groups and the requests are built anew for each cycle from what
Ray reports; what is not placed is asked for again. Scale-ins come first, then scale-outs, each by
priority. A scale-out takes the least valuable domain that fits, in ratio units that stay whole
inside one domain; a scale-in gives back the most valuable domain first. What leaves in a cycle is
not given away in it. What finds no room says why, and may shrink services of lower priority.
"""

import enum
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.candidates import Search
from cluster.names import Role, WorkerId
from cluster.packing import Room, Slot, give_back
from cluster.preemption import Nomination, Preemption
from cluster.service import Counts, DeployGroup, PlacedWorker, Service, Tenure
from cluster.shortage import Cause, Shortage, Wanted, impossible, no_room, service_too_large
from cluster.topology import Topology

# Places that one request may win in one cycle by shrinking others; the next cycle goes on.
MAX_NOMINATIONS = 32


class Direction(enum.StrEnum):
    OUT = "out"
    IN = "in"


@dataclass(frozen=True, slots=True)
class Request:
    """Add `size` workers to `service`, or take them away."""

    direction: Direction
    service: Service
    size: Counts


@dataclass(frozen=True, slots=True)
class Placement:
    """Workers to start together: a ratio unit, or a piece of one; all or none of them."""

    service: str
    domain: str
    slots: tuple[Slot, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Victim:
    """A worker to stop."""

    service: str
    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Unplaced:
    """What is left of a request, and the reason."""

    service: str
    size: Counts
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Degradation:
    """A service made smaller by `size`, so that `in_favour_of` finds room in a later cycle."""

    service: str
    size: Counts
    in_favour_of: str
    victims: tuple[WorkerId, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    placements: tuple[Placement, ...] = ()
    victims: tuple[Victim, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    degradations: tuple[Degradation, ...] = ()


def cycle(topology: Topology, groups: Iterable[DeployGroup], requests: Iterable[Request]) -> Plan:
    """Return what to start and what to stop. `groups` are those of all services; of requests of
    one priority the earlier goes first."""
    state = _Cycle(topology, groups)
    by_priority = sorted(requests, key=lambda request: -request.service.priority)
    for direction, run in ((Direction.IN, state.scale_in), (Direction.OUT, state.scale_out)):
        for request in by_priority:
            if request.direction is direction:
                run(request.service, request.size)
    return state.plan()


def pieces(size: Counts, ratio: Counts) -> Iterator[tuple[Counts, int]]:
    """Yield what is placed as one, and how often: ratio units, then what is left of both roles,
    then single workers of one role."""
    num_units = size.units(ratio)
    rest = size - ratio * num_units
    if num_units:
        yield ratio, num_units
    if rest.prefill and rest.decode:
        piece = rest.at_most(ratio)
        yield piece, 1
        rest -= piece
    for role in Role:
        if rest.of(role):
            yield Counts.one(role), rest.of(role)


class _Cycle:
    """What one cycle has decided so far."""

    def __init__(self, topology: Topology, groups: Iterable[DeployGroup]) -> None:
        self._topology = topology
        self._groups = tuple(groups)
        self._room = Room(topology, self._groups)
        self._stopping: set[WorkerId] = set()
        # Workers per service and domain: those that stay, and those placed in this cycle.
        self._sizes: dict[str, dict[str, Counts]] = defaultdict(lambda: defaultdict(Counts))
        for group in self._groups:
            size = Counts.count(worker.role for worker in self._staying(group))
            if size:
                self._sizes[group.service.name][group.domain] = size
        self._placements: list[Placement] = []
        self._victims: list[Victim] = []
        self._unplaced: list[Unplaced] = []
        self._degradations: list[Degradation] = []

    def plan(self) -> Plan:
        return Plan(
            tuple(self._placements),
            tuple(self._victims),
            tuple(self._unplaced),
            tuple(self._degradations),
        )

    # --- scale-out

    def scale_out(self, service: Service, size: Counts) -> None:
        left = size
        for piece, times in pieces(size, service.ratio):
            num_placed = self._place(service, piece, times)
            left -= piece * num_placed
            if num_placed < times:
                shortage = self._make_room(service, piece, times - num_placed, left)
                self._unplaced.append(Unplaced(service.name, left, shortage.cause, shortage.reason))
                return

    def _place(self, service: Service, piece: Counts, times: int) -> int:
        """Place `piece` up to `times` times; return how often there was room."""
        if piece.prefill and piece.decode:
            return self._fill(service, piece, times, self._domains(service))
        # Each worker changes which group lacks one most.
        placed = (self._place_single(service, piece) for _ in range(times))
        return sum(itertools.takewhile(bool, placed))

    def _place_single(self, service: Service, piece: Counts) -> int:
        tiers = self._tiers(service, piece)
        return next(filter(None, (self._fill(service, piece, 1, tier) for tier in tiers)), 0)

    def _fill(self, service: Service, piece: Counts, times: int, domains: Collection[str]) -> int:
        """Place `piece` in the best of `domains` until that is full, then in the next."""
        existing = [domain for domain, size in self._sizes[service.name].items() if size]
        places = Search(self._topology, service, self._room.free).fill(piece, domains, existing)
        num_placed = 0
        for candidate, slots in itertools.islice(places, times):
            self._room.take(service, slots)
            self._sizes[service.name][candidate.domain] += piece
            placement = Placement(service.name, candidate.domain, slots, str(candidate))
            self._placements.append(placement)
            num_placed += 1
        return num_placed

    def _domains(self, service: Service) -> list[str]:
        return list(self._topology.domains(service.affinity))

    def _tiers(self, service: Service, piece: Counts) -> list[list[str]]:
        """Return the domains `piece` may go to, in tiers to be tried one after another.

        A worker alone is of use only beside workers of the other role, so it goes to a group, the
        one that lacks it most; anywhere if there is no such group yet.
        """
        if piece.prefill and piece.decode:
            return [self._domains(service)]
        role = Role.PREFILL if piece.prefill else Role.DECODE
        groups = self._sizes[service.name]
        lacks = {
            domain: size.of(role.other) * service.ratio.of(role)
            - size.of(role) * service.ratio.of(role.other)
            for domain, size in groups.items()
            if size.of(role.other)
        }
        if not lacks:
            return [self._domains(service)]
        by_lack = sorted(lacks, key=lambda domain: (-lacks[domain], domain))
        return [list(tier) for _, tier in itertools.groupby(by_lack, key=lacks.__getitem__)]

    # --- when there is no room

    def _make_room(self, service: Service, piece: Counts, times: int, left: Counts) -> Shortage:
        """Set aside what will be free for pieces that found no room; return why they wait."""
        total = sum(self._sizes[service.name].values(), left)
        domains = tuple(itertools.chain.from_iterable(self._tiers(service, piece)))
        wanted = Wanted(service, piece, total, domains)
        if shortage := impossible(self._topology, wanted):
            return shortage
        num_waiting = self._await_leaving(service, piece, times)
        degraded = self._degrade(service, piece, min(times - num_waiting, MAX_NOMINATIONS))
        if shortage := service_too_large(self._topology, wanted):
            return shortage
        if num_waiting:
            return Shortage(Cause.LEAVING, f"{piece} wait for workers that are leaving")
        if degraded:
            reason = f"{piece} wait for workers of {', '.join(degraded)} to leave"
            return Shortage(Cause.LEAVING, reason)
        return no_room(self._topology, wanted, self._room.free)

    def _await_leaving(self, service: Service, piece: Counts, times: int) -> int:
        """Promise `piece` room that leaving workers hold; return how often there is enough."""
        num_waiting = 0
        for tier in self._tiers(service, piece):
            places = Search(self._topology, service, self._room.soon).fill(piece, tier)
            for _, slots in itertools.islice(places, times - num_waiting):
                self._room.promise(service, slots)
                num_waiting += 1
        return num_waiting

    def _degrade(self, service: Service, piece: Counts, times: int) -> list[str]:
        """Shrink others until `piece` will fit up to `times` times; return whom."""
        preemption = Preemption(self._topology, service, self._groups, self._staying)
        tiers = self._tiers(service, piece)
        degraded: set[str] = set()
        for _ in range(times):
            tried = (preemption.nominate(piece, tier, self._room.soon) for tier in tiers)
            nomination = next(filter(None, tried), None)
            if nomination is None:
                break
            self._commit(service, nomination)
            degraded |= {eviction.group.service.name for eviction in nomination.evictions}
        return sorted(degraded)

    def _commit(self, service: Service, nomination: Nomination) -> None:
        for eviction in nomination.evictions:
            self._stop(eviction.group, eviction.workers)
            shrunk = eviction.group.service
            self._degradations.append(
                Degradation(
                    shrunk.name,
                    Counts.count(worker.role for worker in eviction.workers),
                    service.name,
                    tuple(worker.worker_id for worker in eviction.workers),
                    f"{service.name} (priority {service.priority}) needs the room of"
                    f" {shrunk.name} (priority {shrunk.priority})",
                )
            )
        self._room.promise(service, nomination.slots)

    # --- scale-in

    def scale_in(self, service: Service, size: Counts) -> None:
        left = size - self._drop_units(service, size.units(service.ratio))
        for role in Role:
            while left.of(role) and self._drop_single(service, role):
                left -= Counts.one(role)
        if left:
            reason = f"{left} more to stop than {service.name} has"
            self._unplaced.append(Unplaced(service.name, left, Cause.NO_WORKERS, reason))

    def _drop_units(self, service: Service, num_units: int) -> Counts:
        """Stop up to `num_units` whole units, those of the most valuable groups first."""
        dropped = Counts()
        for group in sorted(self._groups_of(service), key=self._give_back_order):
            while num_units and self._size(group).units(service.ratio):
                self._drop(group, service.ratio)
                dropped += service.ratio
                num_units -= 1
        return dropped

    def _drop_single(self, service: Service, role: Role) -> bool:
        """Stop one worker of `role` in the group with the most of it for its other role, and
        if possible not the last of its group."""
        (other,) = (each for each in Role if each is not role)

        def order(group: DeployGroup) -> tuple[object, ...]:
            size, ratio = self._size(group), service.ratio
            strands = size.of(role) == 1 and size.of(role.other) > 0
            surplus = size.of(role) * ratio.of(other) - size.of(role.other) * ratio.of(role)
            return (strands, -surplus, *self._give_back_order(group))

        groups = [group for group in self._groups_of(service) if self._size(group).of(role)]
        if groups:
            self._drop(min(groups, key=order), Counts.one(role))
        return bool(groups)

    def _groups_of(self, service: Service) -> list[DeployGroup]:
        return [group for group in self._groups if group.service.name == service.name]

    def _give_back_order(self, group: DeployGroup) -> tuple[int, int, str]:
        staying = self._staying(group)
        value = max((self._value(worker) for worker in staying), default=0)
        return -value, len(staying), group.domain

    def _value(self, worker: PlacedWorker) -> int:
        return self._topology.value(worker.node_id)

    def _drop(self, group: DeployGroup, size: Counts) -> None:
        """Stop `size` workers of `group`: on the most valuable nodes, with the least to lose."""

        def order(worker: PlacedWorker) -> tuple[float, float, str]:
            return -self._value(worker), worker.loss, worker.worker_id

        staying = sorted(self._staying(group), key=order)
        for role in Role:
            workers = [worker for worker in staying if worker.role is role][: size.of(role)]
            self._stop(group, workers)
            for worker in workers:
                value = self._topology.value(worker.node_id)
                reason = f"in {group.domain}, {value.name} subgroup"
                self._victims.append(Victim(group.service.name, worker.worker_id, reason))

    # --- groups

    def _staying(self, group: DeployGroup) -> list[PlacedWorker]:
        return [
            worker
            for worker in group.workers
            if worker.tenure is not Tenure.LEAVING and worker.worker_id not in self._stopping
        ]

    def _size(self, group: DeployGroup) -> Counts:
        return self._sizes[group.service.name][group.domain]

    def _stop(self, group: DeployGroup, workers: Sequence[PlacedWorker]) -> None:
        self._stopping.update(worker.worker_id for worker in workers)
        self._sizes[group.service.name][group.domain] -= Counts.count(w.role for w in workers)
        give_back(self._room.soon, group.service, workers)
