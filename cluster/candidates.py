"""Where a piece of a service may go, best first: the least valuable domain that fits.

A candidate is a domain under a ceiling: only its nodes up to a subgroup class, and only GPU
types up to a rank in each role's order of preference. Ceilings rise from the least valuable
class and the first choices, so the first candidate that holds a piece is the right one.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cluster.names import Role
from cluster.packing import Amount, Free, Packing, Slot, Spot, amount_of
from cluster.service import Counts, Service
from cluster.topology import Node, SubgroupClass, Topology


@dataclass(frozen=True, slots=True)
class Candidate:
    """A domain's nodes under one ceiling, the tightest first, and whether the service would
    start a new deployment group there."""

    domain: str
    value: SubgroupClass
    is_first_choice: bool
    is_new_group: bool
    spots: tuple[Spot, ...]

    def __str__(self) -> str:
        group = "a new group" if self.is_new_group else "the group"
        choice = "first-choice" if self.is_first_choice else "second-choice"
        return f"{group} in {self.domain}, {self.value.name} subgroup, {choice} nodes"


@dataclass(frozen=True, slots=True)
class _Option:
    """A node that holds a worker of some role, and its rank for each such role."""

    node: Node
    value: SubgroupClass
    ranks: dict[Role, int]


@dataclass(frozen=True, slots=True)
class _Ceiling:
    value: SubgroupClass
    ranks: dict[Role, int]


class Search:
    """Looks for places of one service in `free`."""

    def __init__(self, topology: Topology, service: Service, free: Free) -> None:
        self._topology = topology
        self._service = service
        self._free = free
        self._choices = {kind: _choices(service, kind) for kind in topology.gpu_types}

    def fill(
        self, piece: Counts, domains: Collection[str], existing: Collection[str] = ()
    ) -> Iterator[tuple[Candidate, tuple[Slot, ...]]]:
        """Yield a place for `piece` again and again, the best first, until no domain has room.

        The caller deducts each from `free` before it asks for the next.
        """
        for candidate in self.candidates(domains, existing):
            packing = Packing(self._service, candidate.spots, self._free)
            while slots := packing.pack(piece):
                yield candidate, slots

    def place(self, piece: Counts, domains: Collection[str]) -> tuple[Slot, ...] | None:
        """Return the best place for one `piece`, None if none of `domains` has room."""
        return next((slots for _, slots in self.fill(piece, domains)), None)

    def candidates(
        self, domains: Collection[str], existing: Collection[str] = ()
    ) -> Iterator[Candidate]:
        """Yield candidates in `domains`, best first; `existing` domains have a group already."""
        options = {name: self._options(name) for name in domains}
        for ceiling in self._ceilings():
            found = [
                Candidate(
                    name,
                    ceiling.value,
                    not any(ceiling.ranks.values()),
                    name not in existing,
                    self._spots(under),
                )
                for name in domains
                if (under := _under(ceiling, options[name]))
            ]
            yield from sorted(found, key=self._tightness)

    def _options(self, domain: str) -> list[_Option]:
        options = []
        for node in self._topology.domains(self._service.affinity)[domain]:
            free = self._free.get(node.id)
            if free is None:
                continue
            choices = self._choices[node.gpu_type]
            ranks = {role: rank for role, rank, need in choices if free.covers(need)}
            if ranks:
                options.append(_Option(node, self._topology.value(node.id), ranks))
        return options

    def _ceilings(self) -> Iterator[_Ceiling]:
        num_ranks = (self._service.need(role).num_ranks for role in Role)
        by_rank = sorted(itertools.product(*map(range, num_ranks)), key=lambda r: (sum(r), r))
        for value in SubgroupClass:
            for ranks in by_rank:
                yield _Ceiling(value, dict(zip(Role, ranks, strict=True)))

    def _spots(self, options: Sequence[tuple[_Option, frozenset[Role]]]) -> tuple[Spot, ...]:
        def key(option: _Option) -> tuple[object, ...]:
            node, free = option.node, self._free[option.node.id]
            rank = min(option.ranks.values())
            return (option.value, rank, free.gpus, free.cpus, node.s0, node.id)

        ordered = sorted(options, key=lambda found: key(found[0]))
        return tuple(Spot(option.node, roles) for option, roles in ordered)

    def _tightness(self, candidate: Candidate) -> tuple[bool, int, int, str]:
        """Order candidates of one ceiling: groups that exist, then the least room left over."""
        frees = [self._free[spot.node.id] for spot in candidate.spots]
        gpus, cpus = sum(free.gpus for free in frees), sum(free.cpus for free in frees)
        return candidate.is_new_group, gpus, cpus, candidate.domain


def _choices(service: Service, gpu_type: str | None) -> list[tuple[Role, int, Amount]]:
    """Return the roles for which nodes of `gpu_type` are a choice, with rank and need."""
    needs = {role: service.need(role) for role in Role}
    return [
        (role, rank, amount_of(need))
        for role, need in needs.items()
        if (rank := need.rank(gpu_type)) is not None
    ]


def _under(ceiling: _Ceiling, options: Sequence[_Option]) -> list[tuple[_Option, frozenset[Role]]]:
    """Return what of `options` is under `ceiling`, nothing if a lower ceiling says the same."""
    allowed = [option for option in options if option.value <= ceiling.value]
    if not any(option.value == ceiling.value for option in allowed):
        return []
    for role, rank in ceiling.ranks.items():
        if rank and not any(option.ranks.get(role) == rank for option in allowed):
            return []
    found = ((option, _roles(ceiling, option)) for option in allowed)
    return [(option, roles) for option, roles in found if roles]


def _roles(ceiling: _Ceiling, option: _Option) -> frozenset[Role]:
    return frozenset(role for role, rank in option.ranks.items() if rank <= ceiling.ranks[role])
