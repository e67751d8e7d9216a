"""A Ray node dies while the pools change size: they converge, and nothing of it is left."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.ray_plane import NAMESPACE
from deploy.ports import free_port
from tests.background_load import BackgroundLoad
from tests.served import Served, start, stop, tandem_command, tandem_status, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

NAME = "test-node-loss"
FLAGS: dict[str, Any] = {
    "model.engine": "simulated",
    "model.max_model_len": 512,
    "model.block_size": 16,
    "prefill.workers": 2,
    "decode.workers": 2,
    # Two switches: both pools of a unit stay under one of them.
    "placement.affinity": "s1",
}
NODE = {"num_cpus": 4, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "labels": {"tandem/s1": "a"}})
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def served(cluster: Cluster) -> Iterator[Served]:
    port = free_port()
    command = tandem_command(NAME, port, {**FLAGS, "address": cluster.address}, "serve")
    served = start(command, f"http://127.0.0.1:{port}", "tandem-tiny")
    try:
        yield served
    finally:
        stop(served)
        command = [sys.executable, "-m", "deploy.cli", "down", "--name", NAME]
        subprocess.run(command, check=False, capture_output=True)


def nodes_of_ready() -> list[str]:
    return [w["node"] for w in tandem_status(NAME)["workers"] if w["state"] == "ready"]


def scale(prefill: int, decode: int) -> None:
    controller = ray.get_actor(f"{NAME}-controller", namespace=NAMESPACE)
    ray.get(controller.scale.remote(prefill, decode))


def test_pools_converge_after_a_node_dies_while_they_grow(cluster: Cluster, served: Served) -> None:
    second = cluster.add_node(**NODE, labels={"tandem/s1": "b"})
    with BackgroundLoad(served, lambda _: 6.0, 100, 4) as load:
        scale(3, 3)  # the first switch is full: the third unit goes to the second node
        wait_until(lambda: second.node_id in nodes_of_ready(), 60, "workers on the second node")
        scale(4, 4)
        killed_s = load.elapsed_s
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: second.node_id not in nodes_of_ready(), 60, "its workers are gone")
        assert len(nodes_of_ready()) == 4
        wait_until(lambda: tandem_status(NAME)["unplaced"], 30, "what has no room says so")
        cluster.add_node(**NODE, labels={"tandem/s1": "c"})
        wait_until(lambda: len(nodes_of_ready()) == 8, 90, "eight workers again")
        assert tandem_status(NAME)["unplaced"] == []
    # A stream that the dead node's decode worker had begun ends with an error; no other does.
    late = [f for f in load.result().failures if not _is_cut(f, killed_s)]
    assert late == []
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    assert len(groups) == 8


def _is_cut(failure: str, killed_s: float) -> bool:
    """Return whether a stream that had begun at about the time of the kill was cut short."""
    sent_s = float(failure.split()[1])
    return killed_s - 2.0 <= sent_s <= killed_s + 4.0 and "tokens came" in failure
