"""`tandem status`: the controller's view of a running deployment, as a table."""

from typing import Any

from cluster.errors import Unavailable
from deploy.connect import connect_to
from deploy.state import DeploymentState

_TIMEOUT_S = 10.0
_COLUMNS = ("worker_id", "state", "cpus", "start_s", "num_running", "num_free_blocks", "endpoint")


def read_status(state: DeploymentState) -> dict[str, Any]:
    """Ask the deployment's controller; raise `Unavailable` if it does not answer."""
    connect_to(state)
    # Not earlier: what lets this process into the cluster is read when Ray is imported.
    import ray

    from cluster.ray_plane import find_controller

    try:
        controller = find_controller(state.name)
        status: dict[str, Any] = ray.get(controller.status.remote(), timeout=_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        raise Unavailable(f"the controller of {state.name!r} does not answer: {error}") from None
    finally:
        ray.shutdown()
    return status


def show(status: dict[str, Any], url: str) -> str:
    """Return `status` as text."""
    rows = [_COLUMNS, *(tuple(_cell(w[c]) for c in _COLUMNS) for w in status["workers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    health = "healthy" if status["healthy"] else f"not healthy: {status['reason']}"
    head = f"{status['name']}: {status['model']} ({status['engine']}) at {url}/v1, {health}"
    return "\n".join([head, "", *(line.rstrip() for line in lines)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
