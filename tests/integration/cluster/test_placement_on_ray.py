"""Placement over a real Ray cluster: nodes with labels of switches, and GPUs on paper."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.config import parse_config
from cluster.load import RouterLoad
from cluster.names import Role, RouterId
from cluster.ray_plane import NAMESPACE, start_controller
from cluster.worker_spec import Parts
from deploy.engines import AUTOSCALER, ENGINES, ROLES
from tests.served import wait_until

pytestmark = pytest.mark.timeout(200)

PARTS = Parts(ENGINES["simulated"], ROLES, AUTOSCALER)
# One pod of a single GPU type, where a third GPU is left over; one of two types.
NODES = {
    "homo": (3, {"tandem/s2": "homo", "tandem/s1": "h", "tandem/gpu-type": "A"}),
    "mixed-a": (2, {"tandem/s2": "mixed", "tandem/s1": "a", "tandem/gpu-type": "A"}),
    "mixed-b": (2, {"tandem/s2": "mixed", "tandem/s1": "b", "tandem/gpu-type": "B"}),
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Run the cluster; yield the nodes' names by Ray's ids."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_enable_autoscaler_v2", "1")  # only this version heeds GPU types
        memory = {"object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
        added = {
            name: cluster.add_node(num_cpus=4, num_gpus=gpus, labels=labels, **memory)
            for name, (gpus, labels) in NODES.items()
        }
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield {node.node_id: name for name, node in added.items()}
        ray.shutdown()
        cluster.shutdown()


class Deployment:
    """A deployment of the simulated engine with one GPU per worker."""

    def __init__(self, name: str, gpu_types: str, units: int) -> None:
        pool = {"workers": units, "gpus_per_worker": 1, "gpu_types": gpu_types}
        config = parse_config(
            {
                "cluster": {"name": name},
                "prefill": pool,
                "decode": pool,
                "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
            }
        )
        self.name = name
        self.controller = start_controller(config, PARTS, {}, None)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = ray.get(self.controller.status.remote())
        return status

    def ready(self) -> list[tuple[str, str]]:
        """Return role and node of the workers that serve."""
        workers = self.status()["workers"]
        return [(w["role"], w["node"]) for w in workers if w["state"] == "ready"]

    def domains(self) -> dict[str, set[str]]:
        """Return per node the network domains that routers are told of its workers."""
        load = RouterLoad(RouterId("r-test"), 0.0).as_document()
        told = ray.get(self.controller.follow.remote(load, -1))
        domains: dict[str, set[str]] = {}
        for worker in told["workers"]:
            domains.setdefault(worker["node"], set()).add(worker["domain"])
        return domains

    def scale(self, units: int) -> None:
        ray.get(self.controller.scale.remote(units, units))

    def end(self) -> None:
        ray.get(self.controller.drain_and_stop.remote())
        ray.kill(self.controller)


def groups_of(deployment: str) -> list[dict[str, Any]]:
    table = placement_group_table().values()
    groups = [group for group in table if group["name"].startswith(f"{deployment}-")]
    return [group for group in groups if group["state"] != "REMOVED"]


def asked_of_autoscaler() -> list[tuple[int, dict[str, float], dict[str, list[str]]]]:
    """Return how many of which resources Ray's autoscaler was asked for, with the labels."""
    client = ray._private.worker.global_worker.gcs_client
    state = get_cluster_resource_state(client)
    return [
        (
            request.count,
            dict(request.request.resources_bundle),
            {
                constraint.label_key: sorted(constraint.label_values)
                for selector in request.request.label_selectors
                for constraint in selector.label_constraints
            },
        )
        for asked in state.cluster_resource_constraints
        for request in asked.resource_requests
    ]


def unit_on(name: str) -> list[tuple[str, str]]:
    return [(role.value, name) for role in Role]


def test_workers_go_where_the_cycle_says(nodes: dict[str, str]) -> None:
    deployment = Deployment("test-placement", "A,B", 1)
    try:
        wait_until(lambda: len(deployment.ready()) == 2, 60, "the first unit")
        placed = [(role, nodes[node]) for role, node in deployment.ready()]
        assert placed == unit_on("homo"), "the least valuable domain"

        deployment.scale(2)
        wait_until(lambda: len(deployment.ready()) == 4, 60, "the second unit")
        placed = [(role, nodes[node]) for role, node in deployment.ready()]
        assert sorted(placed) == sorted(unit_on("homo") + unit_on("mixed-a")), (
            "whole under one switch, the preferred type first"
        )

        deployment.scale(4)
        wait_until(lambda: len(deployment.ready()) == 6, 60, "the third unit")
        placed = [(role, nodes[node]) for role, node in deployment.ready()]
        assert sorted(placed) == sorted(
            unit_on("homo") + unit_on("mixed-a") + unit_on("mixed-b")
        ), "the compatible type, once nothing else is left"
        domains = {nodes[node]: told for node, told in deployment.domains().items()}
        assert domains == {
            "homo": {"default/homo/h"},
            "mixed-a": {"default/mixed/a"},
            "mixed-b": {"default/mixed/b"},
        }
        (reason,) = wait_until(
            lambda: deployment.status()["unplaced"] or None, 10, "the fourth unit"
        )
        assert reason == (
            "4 prefill and 4 decode workers need 8 GPUs and 8 CPUs; all nodes they may use have"
            " 7 GPUs and 12 CPUs"
        )

        groups = groups_of(deployment.name)
        assert len(groups) == 6
        for group in groups:
            assert group["bundles"] == {0: {"CPU": 1.0, "GPU": 1.0}}
        seats = {w["worker_id"]: w["node"] for w in deployment.status()["workers"]}
        assert {g["name"]: g["bundles_to_node_id"][0] for g in groups} == {
            f"{deployment.name}-{worker_id}": node for worker_id, node in seats.items()
        }
        selector = {"tandem/gpu-type": ["A", "B"]}
        assert asked_of_autoscaler() == [(8, {"CPU": 1.0, "GPU": 1.0}, selector)]

        deployment.scale(3)
        wait_until(lambda: deployment.status()["unplaced"] == [], 10, "nothing is missing")
        wait_until(lambda: asked_of_autoscaler() == [], 10, "nothing is asked for")
    finally:
        deployment.end()
    wait_until(lambda: groups_of(deployment.name) == [], 10, "nothing is left")


def test_a_missing_gpu_type_is_asked_for_and_told(nodes: dict[str, str]) -> None:
    deployment = Deployment("test-missing-type", "C", 1)
    try:
        (reason,) = wait_until(lambda: deployment.status()["unplaced"] or None, 20, "a reason")
        assert reason == "prefill: no node has GPUs of type C; the cluster has A, B"
        selector = {"tandem/gpu-type": ["C"]}
        asked = [(2, {"CPU": 1.0, "GPU": 1.0}, selector)]
        wait_until(lambda: asked_of_autoscaler() == asked, 10, "the autoscaler is asked")
        assert deployment.status()["workers"] == []
    finally:
        deployment.end()
