"""Everything a worker is told when it starts; classes arrive as "module:Class" strings."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import TandemConfig
from cluster.errors import ConfigError
from cluster.names import Role, WorkerId


@dataclass(frozen=True, slots=True)
class Parts:
    """The classes `deploy` chose: one engine, what a worker does in each role, and what sizes
    the pools."""

    engine: str
    roles: Mapping[Role, str]
    autoscaler: str


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a worker's process landed: Ray's node, the machine it is on (several nodes may
    share one), the node's address, the process id there."""

    node: str
    host: str
    address: str
    cores: tuple[int, ...]
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker: who it is, what it is built of, and which cores it may use."""

    worker_id: WorkerId
    role: Role
    engine: str
    roles: Mapping[Role, str]
    config: TandemConfig
    cpus: tuple[int, ...]
    bind_host: str


def load(path: str) -> Any:
    """Return the object that "module:Name" names; raise `ConfigError` if there is none."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"{path!r} must read module:Class")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load {path!r}: {error}") from None
