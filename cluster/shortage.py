"""Why a piece of a service cannot be placed: the one reason that is hardest to remedy."""

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.candidates import Search
from cluster.names import Role
from cluster.packing import Amount, Free, amount, amount_of
from cluster.service import Counts, RoleNeed, Service
from cluster.topology import Node, Topology

_MAX_FAULTS = 3


class Cause(enum.StrEnum):
    """Kinds of reasons. Only other nodes or settings remedy the first four."""

    NO_SUCH_NODE = "no_such_node"
    WORKER_TOO_LARGE = "worker_too_large"
    UNIT_TOO_LARGE = "unit_too_large"
    SERVICE_TOO_LARGE = "service_too_large"
    NO_ROOM = "no_room"
    LEAVING = "leaving"
    NO_WORKERS = "no_workers"


@dataclass(frozen=True, slots=True)
class Shortage:
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What finds no place: the next `piece`, in `domains`, of a service that is to have `total`
    workers."""

    service: Service
    piece: Counts
    total: Counts
    domains: tuple[str, ...]


def impossible(topology: Topology, wanted: Wanted) -> Shortage | None:
    """Return why the piece would not fit even if nothing else ran, None if it would."""
    checks: tuple[Callable[[Topology, Wanted], Shortage | None], ...] = (
        _no_such_node,
        _worker_too_large,
        _unit_too_large,
    )
    for check in checks:
        if found := check(topology, wanted):
            return Shortage(found.cause, found.reason + _faults(topology))
    return None


def service_too_large(topology: Topology, wanted: Wanted) -> Shortage | None:
    """Return why the service as a whole can never be placed, None if it may be."""
    service = wanted.service
    for roles in ([Role.PREFILL], [Role.DECODE], list(Role)):
        needs = _sum(amount_of(service.need(role)) for role in _each(wanted.total, roles))
        has = _sum(_whole(node) for node in _nodes(topology, service, roles))
        if has.gpus < needs.gpus or has.cpus < needs.cpus:
            size = Counts.count(_each(wanted.total, roles))
            reason = f"{size} need {needs}; all nodes they may use have {has}"
            return Shortage(Cause.SERVICE_TOO_LARGE, reason + _faults(topology))
    return None


def no_room(topology: Topology, wanted: Wanted, free: Free) -> Shortage:
    """Return the reason when others have what `wanted` needs."""
    affinity = wanted.service.affinity
    possible = _nodes(topology, wanted.service, _roles(wanted.piece))
    nodes = [node for node in possible if node.domain(affinity) in wanted.domains]
    has = _sum(free[node.id] for node in nodes)
    is_anywhere = len(wanted.domains) == len(topology.domains(affinity))
    where = f"no {affinity} domain has" if is_anywhere else f"no group of {wanted.service.name} has"
    reason = f"{where} room for {wanted.piece}: {has} free on {len(nodes)} possible nodes"
    return Shortage(Cause.NO_ROOM, reason + _faults(topology))


def _roles(piece: Counts) -> list[Role]:
    return [role for role in Role if piece.of(role)]


def _nodes(topology: Topology, service: Service, roles: Sequence[Role]) -> list[Node]:
    """Return the nodes that are a choice for any of `roles`."""
    needs = [service.need(role) for role in roles]
    usable = (node for node in topology.nodes.values() if node.fault is None)
    return [node for node in usable if any(need.rank(node.gpu_type) is not None for need in needs)]


def _no_such_node(topology: Topology, wanted: Wanted) -> Shortage | None:
    for role in _roles(wanted.piece):
        if not _nodes(topology, wanted.service, [role]):
            types = {node.gpu_type for node in topology.nodes.values() if node.gpu_type}
            asked = _asked(wanted.service.need(role))
            reason = f"no node has {asked}; the cluster has {', '.join(sorted(types)) or 'no GPUs'}"
            return Shortage(Cause.NO_SUCH_NODE, f"{role}: {reason}")
    return None


def _asked(need: RoleNeed) -> str:
    if not need.gpus_per_worker:
        return "CPUs for workers"
    return f"GPUs of type {' or '.join(need.gpu_types)}" if need.gpu_types else "GPUs"


def _worker_too_large(topology: Topology, wanted: Wanted) -> Shortage | None:
    for role in _roles(wanted.piece):
        need = amount_of(wanted.service.need(role))
        nodes = _nodes(topology, wanted.service, [role])
        if not any(_whole(node).holds(need) for node in nodes):
            largest = max(map(_whole, nodes), key=lambda whole: (whole.gpus, whole.cpus))
            reason = f"a {role} worker needs {need} on one node; the largest node has {largest}"
            return Shortage(Cause.WORKER_TOO_LARGE, reason)
    return None


def _unit_too_large(topology: Topology, wanted: Wanted) -> Shortage | None:
    service, piece = wanted.service, wanted.piece
    search = Search(topology, service, _empty(topology))
    if search.place(piece, topology.domains(service.affinity)) is not None:
        return None
    reason = f"{piece} do not fit into any one {service.affinity} domain, even an empty one"
    return Shortage(Cause.UNIT_TOO_LARGE, reason)


def _each(size: Counts, roles: Sequence[Role]) -> Iterator[Role]:
    for role in roles:
        yield from [role] * size.of(role)


def _whole(node: Node) -> Amount:
    return amount(node.gpus, node.cpus)


def _empty(topology: Topology) -> Free:
    return {node.id: _whole(node) for node in topology.nodes.values() if node.fault is None}


def _sum(amounts: Iterator[Amount]) -> Amount:
    total = Amount()
    for each in amounts:
        total = total.plus(each)
    return total


def _faults(topology: Topology) -> str:
    """Return which nodes were left out and why, to go behind a reason."""
    faults = [f"{node.id}: {node.fault}" for node in topology.nodes.values() if node.fault]
    if not faults:
        return ""
    shown = "; ".join(faults[:_MAX_FAULTS]) + ("; ..." if len(faults) > _MAX_FAULTS else "")
    return f" ({len(faults)} node{'' if len(faults) == 1 else 's'} left out: {shown})"
