"""Deployments on a Ray cluster of several nodes that the test itself starts, and is part of."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.config import BUNDLED_MODEL
from cluster.ray_plane import NAMESPACE
from deploy.ports import free_port
from tests.served import STOP_TIMEOUT_S, Served, start, stop, tandem_command

NODE: Mapping[str, Any] = {"object_store_memory": 100 << 20}


@contextlib.contextmanager
def ray_cluster(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Cluster]:
    """Run a node per argument set (as `num_cpus`, `labels`) and join them from this process."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, **nodes[0]})
    try:
        for node in nodes[1:]:
            cluster.add_node(**NODE, **node)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        infos = [info for node in cluster.list_all_nodes() for info in node.all_processes.values()]
        cluster.shutdown()
        # It does not wait for all that it ends.
        for process in (each.process for processes in infos for each in processes):
            process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def tandem_on(cluster: Cluster, name: str, flags: Mapping[str, Any]) -> Iterator[Served]:
    """Run `tandem serve` on the cluster with `flags` by configuration path."""
    port = free_port()
    command = tandem_command(name, port, {**flags, "address": cluster.address}, "serve")
    try:
        served = start(command, f"http://127.0.0.1:{port}", BUNDLED_MODEL.name)
        try:
            yield served
        finally:
            stop(served)
    finally:
        down = [sys.executable, "-m", "deploy.cli", "down", "--name", name]
        subprocess.run(down, check=False, capture_output=True)
