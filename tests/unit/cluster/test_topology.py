"""The resource tree: labels in, domains and subgroup classes out; bad labels say so."""

from typing import Any

import pytest

from cluster.topology import (
    DEFAULT_DOMAIN,
    GPU_TYPE_LABEL,
    LOGICAL_CLUSTER_LABEL,
    S1_LABEL,
    S2_LABEL,
    UNKNOWN_GPU_TYPE,
    Level,
    Node,
    SubgroupClass,
    Topology,
    nodes_from_ray,
)
from tests.unit.cluster.tree import mixed_cluster, node


def document(name: str, resources: dict[str, float], **labels: str) -> dict[str, Any]:
    """Return a node as `ray.nodes()` does, without the fields nobody reads."""
    return {"NodeID": name, "Alive": True, "Resources": resources, "Labels": labels}


def parse(*documents: dict[str, Any], **free: dict[str, float]) -> tuple[Node, ...]:
    return nodes_from_ray(documents, free)


def test_labels_and_free_resources_make_a_node() -> None:
    labels = {S2_LABEL: "pod1", S1_LABEL: "rack1", LOGICAL_CLUSTER_LABEL: "east"}
    found = document("n", {"CPU": 16.0, "GPU": 8.0}, **labels, **{GPU_TYPE_LABEL: "H20"})
    (read,) = parse(found, n={"CPU": 4.0, "GPU": 2.0})
    assert read == Node(
        "n", 16, 4, 8, 2, "H20", s1="rack1", s2="pod1", logical_cluster="east", fault=None
    )
    assert [read.domain(level) for level in Level] == ["east/pod1/rack1", "east/pod1", "east"]


def test_what_ray_leaves_out_is_used_up() -> None:
    (read,) = parse(document("n", {"CPU": 2.0, "GPU": 1.0}), n={"memory": 1.0})
    assert (read.free_cpus, read.free_gpus) == (0, 0)
    (head,) = parse(document("head", {}))
    assert (head.cpus, head.free_cpus, head.gpu_type) == (0, 0, None)


def test_nodes_without_labels_share_a_flat_domain() -> None:
    nodes = parse(document("a", {"CPU": 1.0}), document("b", {"CPU": 1.0}))
    assert list(Topology(nodes).domains(Level.S1)) == ["/".join([DEFAULT_DOMAIN] * 3)]


@pytest.mark.parametrize(
    ("labels", "gpu_type"),
    [
        ({}, UNKNOWN_GPU_TYPE),
        ({"ray.io/accelerator-type": "H100"}, "H100"),
        ({"ray.io/accelerator-type": "H100", GPU_TYPE_LABEL: "H20"}, "H20"),
    ],
)
def test_the_gpu_type_is_ours_then_rays(labels: dict[str, str], gpu_type: str) -> None:
    (read,) = parse(document("n", {"GPU": 1.0}, **labels))
    assert read.gpu_type == gpu_type


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ({"tandem/s3": "x"}, "unknown label tandem/s3 (nearest known label: tandem/s"),
        ({S1_LABEL: "a/b"}, "label tandem/s1=a/b contains a slash"),
        ({"somebody/else": "x"}, None),
    ],
)
def test_a_label_that_cannot_be_read_is_a_fault(labels: dict[str, str], fault: str | None) -> None:
    (read,) = parse(document("n", {"CPU": 1.0}, **labels))
    assert read.fault is fault if fault is None else str(read.fault).startswith(fault)


def test_dead_nodes_are_gone_and_avoided_ones_say_why() -> None:
    dead = {**document("dead", {}), "Alive": False}
    (read,) = nodes_from_ray([dead, document("n", {"CPU": 1.0})], {}, {"n": "draining"})
    assert (read.id, read.fault) == ("n", "draining")


def test_subgroup_classes() -> None:
    tree = mixed_cluster()
    expected = {
        "homo": SubgroupClass.S2_HOMO,
        "het": SubgroupClass.S2_HET,
        "s1het": SubgroupClass.S1_HET,
    }
    for name in tree.nodes:
        assert tree.value(name) is expected[name.partition("/")[0]]


def test_an_s2_switch_may_hold_subgroups_of_two_classes() -> None:
    tree = Topology([node("p/a/1", "A"), node("p/a/2", "B"), node("p/b/1", "A")])
    assert tree.value("p/a/1") is SubgroupClass.S1_HET
    assert tree.value("p/b/1") is SubgroupClass.S2_HET


def test_nodes_without_gpus_are_worth_least_and_make_nothing_heterogeneous() -> None:
    tree = Topology([node("p/a/1", "A"), node("p/a/2", None)])
    assert tree.value("p/a/1") is tree.value("p/a/2") is SubgroupClass.S2_HOMO


def test_switch_names_repeat_below_different_switches() -> None:
    tree = Topology([node("p/a/1", "A"), node("q/a/2", "B")])
    assert list(tree.domains(Level.S1)) == ["default/p/a", "default/q/a"]
    assert tree.value("p/a/1") is SubgroupClass.S2_HOMO
