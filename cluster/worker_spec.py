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
    """One worker: who it is, what it is built of, and which cores it may use.

    `keys` is a file with the deployment's CURVE keys; without it sockets are plain.
    """

    worker_id: WorkerId
    role: Role
    engine: str
    roles: Mapping[Role, str]
    config: TandemConfig
    cpus: tuple[int, ...]
    bind_host: str
    keys: str | None = None


def listening_on(config: TandemConfig, host: str) -> TandemConfig:
    """Return `config` with the KV plane on `host`, unless the operator chose an address."""
    if "bind_host" in config.handoff.model_fields_set:
        return config
    return config.model_copy(
        update={"handoff": config.handoff.model_copy(update={"bind_host": host})}
    )


def load(path: str) -> Any:
    """Return the object that "module:Name" names; raise `ConfigError` if there is none."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"{path!r} must read module:Class")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load {path!r}: {error}") from None
