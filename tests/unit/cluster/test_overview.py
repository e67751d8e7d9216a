"""The state that operators read: status, load, signal and latencies in one document."""

import json
from typing import Any

from cluster.history import History, Scales
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role, RouterId, WorkerId
from cluster.overview import NO_SCALING, ready_workers, scales, state_document
from cluster.worker_state import WorkerState

WORKERS = (
    WorkerLoad(
        WorkerId("prefill-1"),
        Role.PREFILL,
        WorkerState.READY,
        7,
        at=99.0,
        num_waiting=3,
        num_blocks=64,
        computed_prompt_tokens=500,
    ),
    WorkerLoad(WorkerId("decode-1"), Role.DECODE, WorkerState.STARTING, 0),
)
ROUTER = RouterLoad(RouterId("r-1"), 99.5, arrived=4, handoffs=3, handoff_failures=1)
LOAD = ClusterLoad(100.0, WORKERS, (ROUTER,))
STATUS: dict[str, Any] = {
    "name": "tandem",
    "workers": [
        {"worker_id": "prefill-1", "node": "n1"},
        {"worker_id": "decode-1", "node": None},
    ],
}
SCALING: dict[str, Any] = {
    **NO_SCALING,
    "signal": {"value": 60.0, "capacity": 80.0, "target": 160.0},
    "objectives": {"ttft_s": 0.5, "tbt_s": None, "quantile": 0.95},
}


def state(scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    return state_document(STATUS, LOAD, scaling, History().recent())


def test_workers_have_their_load() -> None:
    ready, starting = state()["workers"]
    assert (ready["num_waiting"], ready["num_blocks"], ready["epoch"]) == (3, 64, 7)
    assert ready["computed_prompt_tokens"] == 500
    assert starting["num_waiting"] is None and starting["busy_s"] is None
    assert starting["epoch"] == 0


def test_latencies_stand_beside_their_objectives_and_routers_beside_their_age() -> None:
    document = state(SCALING)
    assert document["latency"]["ttft"] == {
        **dict.fromkeys(("p50", "p95", "p99")),
        "count": 0,
        "objective_s": 0.5,
    }
    assert document["latency"]["quantile"] == 0.95
    (router,) = document["routers"]
    assert (router["router_id"], router["heard_s_ago"]) == ("r-1", 0.5)
    assert (router["handoffs"], router["handoff_failures"]) == (3, 1)
    assert document["ready"] == {"prefill": 1, "decode": 0}
    assert document["name"] == "tandem" and json.dumps(document)


def test_before_there_is_a_scaler_nothing_is_known_of_the_signal() -> None:
    assert state()["scaling"] == NO_SCALING
    wanted = {Role.PREFILL: 1, Role.DECODE: 2}
    assert scales(LOAD, wanted, None) == Scales(wanted, ready_workers(LOAD))
    known = scales(LOAD, wanted, SCALING)
    assert (known.signal, known.capacity, known.target) == (60.0, 80.0, 160.0)
