"""A Ray node dies while the pools change size: they converge, and nothing of it is left."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.ray_plane import find_controller
from tests.background_load import BackgroundLoad
from tests.cut_streams import only_cut_streams_failed
from tests.on_cluster import NODE, ray_cluster, tandem_on
from tests.served import Served, wait_until

pytestmark = pytest.mark.timeout(400)

NAME = f"test-node-loss-{os.getpid()}"
FLAGS: dict[str, Any] = {
    "model.engine": "simulated",
    "model.max_model_len": 512,
    "model.block_size": 16,
    # Streams long enough that some run on the node when it dies.
    "simulated.decode_step_s": 0.03,
    "router.records": 10_000,
    "prefill.workers": 2,
    "decode.workers": 2,
    # Two switches: both pools of a unit stay under one of them.
    "placement.affinity": "s1",
}
CPUS = 4


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ray_cluster([{"num_cpus": CPUS, "labels": {"tandem/s1": "a"}}]) as cluster:
        yield cluster


@pytest.fixture
def served(cluster: Cluster) -> Iterator[Served]:
    with tandem_on(cluster, NAME, FLAGS) as served:
        yield served


def status(served: Served) -> dict[str, Any]:
    """Return what the controller says, once it answers: it may be slow while nodes die."""
    return wait_until(lambda: served.state() or None, 60, "the controller answers")


def nodes_of_ready(served: Served) -> list[str]:
    return [w["node"] for w in status(served)["workers"] if w["state"] == "ready"]


def workers_on(served: Served, node_id: str) -> list[str]:
    return [w["worker_id"] for w in status(served)["workers"] if w["node"] == node_id]


def num_streams_on(served: Served, worker_ids: list[str]) -> int:
    """Return how many streams the router has open on these workers."""
    known = served.workers()
    return sum(known[each]["reserved"]["num_streams"] for each in worker_ids if each in known)


def scale(prefill: int, decode: int) -> None:
    ray.get(find_controller(NAME).scale.remote(prefill, decode))


def test_pools_converge_after_a_node_dies_while_they_grow(cluster: Cluster, served: Served) -> None:
    second = cluster.add_node(**NODE, num_cpus=CPUS, labels={"tandem/s1": "b"})
    with BackgroundLoad(served, lambda _: 6.0, 100, 60) as load:
        scale(3, 3)  # the first switch is full: the third unit goes to the second node
        wait_until(
            lambda: second.node_id in nodes_of_ready(served), 60, "workers on the second node"
        )
        scale(4, 4)
        wait_until(
            lambda: len(workers_on(served, second.node_id)) == CPUS, 60, "the fourth unit starts"
        )
        lost = workers_on(served, second.node_id)
        # They last for 2 s, and most have begun.
        wait_until(lambda: num_streams_on(served, lost) >= 4, 60, "streams on the second node")
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: second.node_id not in nodes_of_ready(served), 60, "its workers are gone")
        assert len(nodes_of_ready(served)) == 4
        wait_until(lambda: status(served)["unplaced"], 30, "what has no room says so")
        cluster.add_node(**NODE, num_cpus=CPUS, labels={"tandem/s1": "c"})
        wait_until(lambda: len(nodes_of_ready(served)) == 8, 90, "eight workers again")
        assert status(served)["unplaced"] == []
    assert only_cut_streams_failed(served, load.result(), lost), "streams ran on the dead node"
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    assert len(groups) == 8
