"""What `GET /admin/state` answers: the controller's status beside load, signal, latencies. Pure."""

from collections.abc import Mapping
from typing import Any

from cluster.history import WINDOW_S, Recent, Scales
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role
from cluster.worker_state import WorkerState

# What a scaler says of itself before there is one.
NO_SCALING: Mapping[str, Any] = {
    "signal": None,
    "objectives": {"ttft_s": None, "tbt_s": None, "quantile": None},
    "ratio": None,
    "pin": None,
    "last_seq": 0,
}


def ready_workers(load: ClusterLoad) -> dict[Role, int]:
    """Return how many workers of each role serve."""
    ready = [worker.role for worker in load.workers if worker.state is WorkerState.READY]
    return {role: ready.count(role) for role in Role}


def scales(
    load: ClusterLoad, wanted: Mapping[Role, int], scaling: Mapping[str, Any] | None
) -> Scales:
    """Return the pools' sizes beside the signal as the scaler describes it."""
    signal = (scaling or NO_SCALING)["signal"] or {}
    return Scales(
        dict(wanted),
        ready_workers(load),
        signal.get("value"),
        signal.get("capacity"),
        signal.get("target"),
    )


def state_document(
    status: Mapping[str, Any],
    load: ClusterLoad,
    scaling: Mapping[str, Any] | None,
    recent: Recent,
) -> dict[str, Any]:
    """Return the whole state, JSON-able."""
    scaling = scaling or NO_SCALING
    loads = {worker.worker_id: worker for worker in load.workers}
    objectives = scaling["objectives"]
    latency = {
        name: {
            **recent.percentiles(name),
            "count": getattr(recent.traffic, name).count,
            "objective_s": objectives[f"{name}_s"],
        }
        for name in ("ttft", "tbt")
    }
    return {
        **status,
        "at": load.at,
        "workers": [
            _worker(described, loads.get(described["worker_id"])) for described in status["workers"]
        ],
        "ready": {role.value: n for role, n in ready_workers(load).items()},
        "scaling": dict(scaling),
        "latency": {"window_s": WINDOW_S, "quantile": objectives["quantile"], **latency},
        "traffic": recent.rates(),
        "routers": [_router(router, load.at) for router in load.routers],
    }


def _worker(described: Mapping[str, Any], load: WorkerLoad | None) -> dict[str, Any]:
    """Return one worker; counts are null until it has reported."""
    has_reported = load is not None and load.at is not None
    counts = {
        name: getattr(load, name) if has_reported else None
        for name in (
            "num_waiting",
            "num_blocks",
            "generated_tokens",
            "computed_prompt_tokens",
            "busy_s",
        )
    }
    return {**described, **counts, "epoch": load.epoch if load else None}


def _router(load: RouterLoad, now: float) -> dict[str, Any]:
    return {
        "router_id": load.router_id,
        "heard_s_ago": max(0.0, now - load.at),
        "arrived": load.arrived,
        "finished": load.finished,
        "failed": load.failed,
        "handoffs": load.handoffs,
        "handoff_bytes": load.handoff_bytes,
        "handoff_failures": load.handoff_failures,
    }
