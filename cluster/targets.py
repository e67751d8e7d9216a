"""Every process of a deployment as Prometheus's HTTP service discovery lists targets. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.names import Component
from cluster.snapshot import WorkerEntry


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process's metrics are ("host:port"), on which node, and when it last said so."""

    exporter: str
    node: str
    at: float


def target_list(
    deployment: str, controller: Address, routers: Iterable[Address], workers: Iterable[WorkerEntry]
) -> list[dict[str, Any]]:
    """Return one group per process: its address, and labels that every sample of it gets."""
    groups = [_group(deployment, Component.CONTROLLER, controller.exporter, controller.node)]
    groups += [_group(deployment, Component.ROUTER, each.exporter, each.node) for each in routers]
    for entry in workers:
        if not entry.exporter:
            continue
        own = {"worker_id": str(entry.worker_id), "role": entry.role.value}
        groups.append(_group(deployment, Component.WORKER, entry.exporter, entry.node, **own))
    return groups


def _group(
    deployment: str, component: Component, exporter: str, node: str, **own: str
) -> dict[str, Any]:
    labels = {"deployment": deployment, "component": component.value, "node": node, **own}
    return {"targets": [exporter], "labels": labels}
