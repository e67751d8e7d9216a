"""Where a Ray node stands in the network, from what its cloud says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import TandemError
from cluster.topology import nodes_from_ray
from deploy import node_labels
from deploy.node_labels import as_label_value, from_instance_topology, from_table, ray_labels

EKS = {
    "topology.k8s.aws/network-node-layer-1": "nn-top",
    "topology.k8s.aws/network-node-layer-2": "nn-middle",
    "topology.k8s.aws/network-node-layer-3": "nn-bottom",
    "topology.kubernetes.io/zone": "us-west-2a",
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
}
CLUSTER_AND_TYPE = {
    "tandem/logical-cluster": "us-west-2a",
    "tandem/gpu-type": "NVIDIA-H100-80GB-HBM3",
}


def test_amazons_lowest_layer_is_the_switch_beside_the_node() -> None:
    three = {**CLUSTER_AND_TYPE, "tandem/s1": "nn-bottom", "tandem/s2": "nn-middle"}
    assert ray_labels(EKS) == three
    four = {**EKS, "topology.k8s.aws/network-node-layer-4": "nn-leaf"}
    assert ray_labels(four) == {**three, "tandem/s1": "nn-leaf", "tandem/s2": "nn-bottom"}


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (
            {
                "cloud.google.com/gce-topology-block": "b",
                "cloud.google.com/gce-topology-subblock": "s",
            },
            {"tandem/s1": "s", "tandem/s2": "b"},
        ),
        (
            {f"network.topology.nvidia.com/{k}": k for k in ("accelerator", "leaf", "spine")},
            {"tandem/s0": "accelerator", "tandem/s1": "leaf", "tandem/s2": "spine"},
        ),
        ({"cloud.google.com/gke-accelerator": "nvidia-l4"}, {"tandem/gpu-type": "nvidia-l4"}),
        ({"kubernetes.io/hostname": "n1"}, {}),
    ],
)
def test_each_source_is_understood(labels: dict[str, str], found: dict[str, str]) -> None:
    assert ray_labels(labels) == found


def test_labels_of_ours_on_the_node_go_first_and_sources_are_not_mixed() -> None:
    """A leaf of one source under a spine of another would join nodes that are far apart."""
    found = ray_labels({**EKS, "tandem/s1": "rack-7", "tandem/gpu-type": "H100"})
    assert found == {**CLUSTER_AND_TYPE, "tandem/s1": "rack-7", "tandem/gpu-type": "H100"}


def test_one_instances_topology() -> None:
    instance = {"NetworkNodes": ["nn-1", "nn-2", "nn-3"], "AvailabilityZone": "us-west-2a"}
    assert from_instance_topology({"Instances": [instance]}) == {
        "tandem/s1": "nn-3",
        "tandem/s2": "nn-2",
        "tandem/logical-cluster": "us-west-2a",
    }
    # Instance types without network topology still have a zone.
    bare = from_instance_topology({"Instances": [{"AvailabilityZone": "z"}]})
    assert bare == {"tandem/logical-cluster": "z"}
    with pytest.raises(TandemError, match="one instance"):
        from_instance_topology({"Instances": []})


@pytest.mark.parametrize("text", ["leaf/1", "ü", "-x-", "a" * 64, "/"])
def test_any_text_becomes_a_value_that_ray_takes(text: str) -> None:
    value = as_label_value(text)
    assert 0 < len(value) <= 63 and value[0].isalnum() and value[-1].isalnum()
    assert value.isascii() and "/" not in value
    assert as_label_value(text) == value != as_label_value(f"{text}.")


def test_the_table_on_premises_names_what_it_lacks(tmp_path: Path, capsys: Any) -> None:
    table = {"a": {"s1": "leaf", "s2": "spine", "gpu-type": "H100"}, "b": {"s3": "x"}}
    assert from_table(table, "a")["tandem/s1"] == "leaf"
    with pytest.raises(TandemError, match=r"no row for the host 'c'"):
        from_table(table, "c")
    with pytest.raises(TandemError, match="unknown tandem/s3"):
        from_table(table, "b")
    path, out = tmp_path / "t.yaml", tmp_path / "labels.yaml"
    path.write_text(json.dumps(table))
    asked = ["table", "--table", str(path), "--out", str(out), "--host"]
    assert node_labels.main([*asked, "c"]) == 1
    assert capsys.readouterr().err.startswith("error: no labels from table: the table")
    assert node_labels.main([*asked, "a"]) == 0
    assert yaml.safe_load(out.read_text())["tandem/s2"] == "spine"


def test_placement_reads_what_is_written() -> None:
    document = {
        "NodeID": "n",
        "Alive": True,
        "Resources": {"CPU": 8.0, "GPU": 8.0},
        "Labels": ray_labels(EKS),
    }
    (node,) = nodes_from_ray([document], {})
    assert (node.s1, node.s2, node.logical_cluster) == ("nn-bottom", "nn-middle", "us-west-2a")
    assert node.gpu_type == "NVIDIA-H100-80GB-HBM3" and node.fault is None
