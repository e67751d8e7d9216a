"""Reports survive their documents, and what is none is refused."""

import json

import pytest

from cluster.latency import LatencyCounts
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role, RouterId, WorkerId
from cluster.worker_state import WorkerState

WORKER = WorkerLoad(
    WorkerId("decode-1"), Role.DECODE, WorkerState.READY, 7, at=12.5, num_running=3, busy_s=1.25
)
ROUTER = RouterLoad(
    RouterId("r1"), 12.5, arrived=4, finished=3, ttft=LatencyCounts(((3, 1), (90, 2)))
)
LOAD = ClusterLoad(13.0, (WORKER, WorkerLoad(WorkerId("n"), Role.PREFILL, WorkerState.PENDING, 0)))


def test_a_load_round_trips_through_json() -> None:
    load = ClusterLoad(LOAD.at, LOAD.workers, (ROUTER,))
    assert ClusterLoad.from_document(json.loads(json.dumps(load.as_document()))) == load


def test_a_worker_that_has_not_reported_has_no_time() -> None:
    silent = LOAD.workers[1]
    assert silent.at is None and silent.generated_tokens == 0
    assert WorkerLoad.from_document(silent.as_document()) == silent


@pytest.mark.parametrize(
    "change",
    [{"role": "cook"}, {"state": "asleep"}, {"surprise": 1}],
)
def test_a_document_that_is_no_worker_load_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        WorkerLoad.from_document({**WORKER.as_document(), **change})


def test_a_document_that_is_no_router_load_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        RouterLoad.from_document({**ROUTER.as_document(), "ttft": [[1, 0]]})
