"""`tandem status`: the controller's view of a running deployment, as a table."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from cluster.config import ClusterSection
from deploy.controller_link import controller_of, desired_sizes

_COLUMNS = (
    "worker_id",
    "role",
    "state",
    "cpus",
    "start_s",
    "num_running",
    "num_free_blocks",
    "endpoint",
)


def read_status(cluster: ClusterSection) -> dict[str, Any]:
    """Ask the deployment's controller; raise `Unavailable` if it does not answer."""
    # Ray prints what happens to nodes, whatever it is told; our own output may be JSON.
    with redirect_stdout(sys.stderr), controller_of(cluster) as controller:
        return controller.status()


def show(status: dict[str, Any], url: str | None) -> str:
    """Return `status` as text; `url` is None where only the cluster knows the endpoint."""
    where = f" at {url}/v1" if url else ""
    health = "healthy" if status["healthy"] else f"not healthy: {status['reason']}"
    lines = [
        f"{status['name']}: {status['model']} ({status['engine']}){where}, {health}",
        f"desired {desired_sizes(status)}, autoscaler {status['autoscaler']},"
        f" controller epoch {status['epoch']}{', sizes held by hand' if status['pinned'] else ''}",
        *(f"no place: {reason}" for reason in status["unplaced"]),
        *(f"not paired: {pair}: {reason}" for pair, reason in status["refused_pairs"].items()),
        *_unwritten(status["unwritten_decisions"]),
        "",
        *table([_COLUMNS, *(tuple(_cell(w[c]) for c in _COLUMNS) for w in status["workers"])]),
    ]
    return "\n".join(lines)


def _unwritten(count: int) -> list[str]:
    return [f"{count} decisions could not be written to the decision file"] if count else []


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
