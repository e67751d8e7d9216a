"""What placement speaks about: services, what their workers need, and where these are.

A service is one model with its two roles. Its workers of one scheduling domain form a
deployment group; hand-offs stay inside a group.
"""

import enum
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from cluster.config import PoolSection, TandemConfig
from cluster.errors import ConfigError
from cluster.names import Role, WorkerId
from cluster.topology import Level, Topology


@dataclass(frozen=True, slots=True)
class Counts:
    """A number of workers of each role, never negative."""

    prefill: int = 0
    decode: int = 0

    def __post_init__(self) -> None:
        if self.prefill < 0 or self.decode < 0:
            raise ValueError(f"{self.prefill} prefill and {self.decode} decode workers")

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)

    def __str__(self) -> str:
        parts = [f"{self.of(role)} {role}" for role in Role if self.of(role)]
        return f"{' and '.join(parts) or 'no'} worker{'' if self.total == 1 else 's'}"

    def __add__(self, other: Self) -> "Counts":
        return Counts(self.prefill + other.prefill, self.decode + other.decode)

    def __sub__(self, other: Self) -> "Counts":
        return Counts(self.prefill - other.prefill, self.decode - other.decode)

    def __mul__(self, times: int) -> "Counts":
        return Counts(self.prefill * times, self.decode * times)

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    def of(self, role: Role) -> int:
        return self.prefill if role is Role.PREFILL else self.decode

    def at_most(self, other: Self) -> "Counts":
        """Return the smaller of both numbers, role by role."""
        return Counts(min(self.prefill, other.prefill), min(self.decode, other.decode))

    def units(self, ratio: Self) -> int:
        """Return how many whole units of `ratio` these workers make."""
        return min(self.of(role) // ratio.of(role) for role in Role)

    @classmethod
    def one(cls, role: Role) -> Self:
        return cls(int(role is Role.PREFILL), int(role is Role.DECODE))

    @classmethod
    def count(cls, roles: Iterable[Role]) -> Self:
        found = list(roles)
        return cls(found.count(Role.PREFILL), found.count(Role.DECODE))


@dataclass(frozen=True, slots=True)
class RoleNeed:
    """What one worker needs, on one node. `gpu_types` stand in order of preference; none
    means any."""

    cpus_per_worker: float
    gpus_per_worker: float = 0.0
    gpu_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError(
                f"a worker of {self.gpus_per_worker} GPUs and {self.cpus_per_worker} CPUs:"
                " it needs a CPU, and no fewer than no GPUs"
            )

    def rank(self, gpu_type: str | None) -> int | None:
        """Return how far from the first choice nodes of `gpu_type` are, None if no choice.

        A worker without GPUs leaves nodes with GPUs to others while it can.
        """
        if not self.gpus_per_worker:
            return 0 if gpu_type is None else 1
        if gpu_type is None:
            return None
        if not self.gpu_types:
            return 0
        return self.gpu_types.index(gpu_type) if gpu_type in self.gpu_types else None

    @property
    def num_ranks(self) -> int:
        """How many ranks `rank` tells apart."""
        return max(1, len(self.gpu_types)) if self.gpus_per_worker else 2


@dataclass(frozen=True, slots=True)
class Service:
    """One model. A higher `priority` goes first; a group stays within one domain of `affinity`;
    `min_units` units of `ratio` are left to it when others need its room."""

    name: str
    prefill: RoleNeed
    decode: RoleNeed
    ratio: Counts = Counts(1, 1)
    priority: int = 0
    affinity: Level = Level.S2
    min_units: int = 1

    def __post_init__(self) -> None:
        if not (self.ratio.prefill and self.ratio.decode):
            raise ConfigError(
                f"service {self.name}: a P:D ratio of {self.ratio.prefill}:{self.ratio.decode}"
                " has no unit; both sides must be at least 1"
            )

    def need(self, role: Role) -> RoleNeed:
        return self.prefill if role is Role.PREFILL else self.decode


class Tenure(enum.Enum):
    """Whether a worker's resources are its own: placed but unknown to Ray, held, on the way out."""

    CLAIMED = enum.auto()
    HELD = enum.auto()
    LEAVING = enum.auto()


@dataclass(frozen=True, slots=True)
class PlacedWorker:
    """A worker on its node. `loss` is what stopping it would throw away (pinned KV blocks,
    warm cache) in any one unit; of workers placed alike the one with the least is stopped."""

    worker_id: WorkerId
    role: Role
    node_id: str
    tenure: Tenure = Tenure.HELD
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class DeployGroup:
    """The workers of one service inside one domain of its affinity."""

    service: Service
    domain: str
    workers: tuple[PlacedWorker, ...]


def deploy_groups(
    topology: Topology, service: Service, workers: Iterable[PlacedWorker]
) -> tuple[DeployGroup, ...]:
    """Return the groups of `service`; workers on nodes that are gone belong to none."""
    members: dict[str, list[PlacedWorker]] = defaultdict(list)
    for worker in workers:
        if node := topology.nodes.get(worker.node_id):
            members[node.domain(service.affinity)].append(worker)
    return tuple(DeployGroup(service, name, tuple(members[name])) for name in sorted(members))


def service_of(config: TandemConfig, ratio: Counts) -> Service:
    """Return the service that `config` deploys, to be kept at `ratio`."""
    return Service(
        name=config.cluster.name,
        prefill=pool_need(config.prefill),
        decode=pool_need(config.decode),
        ratio=ratio,
        priority=config.placement.priority,
        affinity=Level(config.placement.affinity),
        min_units=config.placement.min_units,
    )


def pool_need(pool: PoolSection) -> RoleNeed:
    """Return what one worker of the pool needs."""
    return RoleNeed(pool.cpus_per_worker, pool.gpus_per_worker, pool.gpu_types)
