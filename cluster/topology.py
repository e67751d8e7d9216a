"""The resource tree: nodes under switches, from Ray's node labels, and what each is worth.

Pure: `ray.nodes()` and the free resources are passed in as documents. A node without labels
stands in a flat default domain; a node whose labels cannot be read is kept, takes no workers,
and says why.
"""

import difflib
import enum
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LABEL_PREFIX = "tandem/"
LOGICAL_CLUSTER_LABEL = f"{LABEL_PREFIX}logical-cluster"
S2_LABEL, S1_LABEL, S0_LABEL = (f"{LABEL_PREFIX}{switch}" for switch in ("s2", "s1", "s0"))
GPU_TYPE_LABEL = f"{LABEL_PREFIX}gpu-type"
LABELS = (LOGICAL_CLUSTER_LABEL, S2_LABEL, S1_LABEL, S0_LABEL, GPU_TYPE_LABEL)
# What Ray itself found on the node; ours goes over it, for Ray refuses labels of this prefix.
_RAY_GPU_TYPE_LABEL = "ray.io/accelerator-type"

DEFAULT_DOMAIN = "default"
UNKNOWN_GPU_TYPE = "unknown"


class Level(enum.StrEnum):
    """A level of the tree, narrowest first: an S1 switch, an S2 switch, a logical cluster."""

    S1 = "s1"
    S2 = "s2"
    CLUSTER = "cluster"


class SubgroupClass(enum.IntEnum):
    """The class of an RDMA subgroup; the higher, the scarcer, and the longer it is kept free.

    S2_HOMO: one GPU type under the S2 switch. S2_HET: several, each S1 switch with one of them.
    S1_HET: several GPU types under one S1 switch.
    """

    S2_HOMO = 0
    S2_HET = 1
    S1_HET = 2


@dataclass(frozen=True, slots=True)
class Node:
    """One Ray node. `gpu_type` is None without GPUs; `fault` says why it takes no workers.

    Switch names need to be unique only below the switch above them.
    """

    id: str
    cpus: float
    free_cpus: float
    gpus: float = 0.0
    free_gpus: float = 0.0
    gpu_type: str | None = None
    s0: str = DEFAULT_DOMAIN
    s1: str = DEFAULT_DOMAIN
    s2: str = DEFAULT_DOMAIN
    logical_cluster: str = DEFAULT_DOMAIN
    fault: str | None = None

    def domain(self, level: Level) -> str:
        """Return the domain of `level` this node stands in, as its path from the top."""
        path = (self.logical_cluster, self.s2, self.s1)
        return "/".join(path[: {Level.CLUSTER: 1, Level.S2: 2, Level.S1: 3}[level]])

    @property
    def network(self) -> str:
        """The domain of the S1 switch, empty where the node has no network labels."""
        domain = self.domain(Level.S1)
        return "" if set(domain.split("/")) == {DEFAULT_DOMAIN} else domain


class Topology:
    """The tree of one moment; built anew for each placement cycle."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.gpu_types = frozenset(node.gpu_type for node in self.nodes.values())
        self._domains = {level: self._members(level) for level in Level}
        self._values = self._classes()

    def _members(self, level: Level) -> dict[str, tuple[Node, ...]]:
        members: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes.values():
            members[node.domain(level)].append(node)
        return {name: tuple(members[name]) for name in sorted(members)}

    def _classes(self) -> dict[str, SubgroupClass]:
        """Return the class of each node, set from the widest level to the narrowest."""
        classes = dict.fromkeys(self.nodes, SubgroupClass.S2_HOMO)
        for level, value in ((Level.S2, SubgroupClass.S2_HET), (Level.S1, SubgroupClass.S1_HET)):
            for members in self._domains[level].values():
                with_gpus = [node for node in members if node.gpu_type is not None]
                if len({node.gpu_type for node in with_gpus}) > 1:
                    classes.update((node.id, value) for node in with_gpus)
        return classes

    def domains(self, level: Level) -> Mapping[str, tuple[Node, ...]]:
        """Return the nodes of every domain of `level`, by the domain's path."""
        return self._domains[level]

    def value(self, node_id: str) -> SubgroupClass:
        """Return the class of the subgroup a node belongs to; the lowest without GPUs."""
        return self._values[node_id]


def gpu_type_label(documents: Iterable[Mapping[str, Any]]) -> str:
    """Return the label that tells GPU types in this cluster: ours where any node has it."""
    has_ours = any(GPU_TYPE_LABEL in document["Labels"] for document in documents)
    return GPU_TYPE_LABEL if has_ours else _RAY_GPU_TYPE_LABEL


def nodes_from_ray(
    documents: Iterable[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]],
    avoid: Mapping[str, str] | None = None,
) -> tuple[Node, ...]:
    """Return the live nodes of `ray.nodes()`, with the free resources Ray reports per node id.

    `avoid` maps nodes that must not take workers (draining, failing starts) to the reason.
    """
    return tuple(
        _node(
            document, available.get(document["NodeID"], {}), (avoid or {}).get(document["NodeID"])
        )
        for document in documents
        if document["Alive"]
    )


def _node(document: Mapping[str, Any], free: Mapping[str, float], avoid: str | None) -> Node:
    # Ray leaves out a resource of which nothing is left, or which the node never had.
    total, labels = document["Resources"], document["Labels"]
    gpus = total.get("GPU", 0.0)
    gpu_type = labels.get(GPU_TYPE_LABEL) or labels.get(_RAY_GPU_TYPE_LABEL) or UNKNOWN_GPU_TYPE
    return Node(
        id=document["NodeID"],
        cpus=total.get("CPU", 0.0),
        free_cpus=free.get("CPU", 0.0),
        gpus=gpus,
        free_gpus=free.get("GPU", 0.0),
        gpu_type=gpu_type if gpus else None,
        s0=labels.get(S0_LABEL) or DEFAULT_DOMAIN,
        s1=labels.get(S1_LABEL) or DEFAULT_DOMAIN,
        s2=labels.get(S2_LABEL) or DEFAULT_DOMAIN,
        logical_cluster=labels.get(LOGICAL_CLUSTER_LABEL) or DEFAULT_DOMAIN,
        fault=avoid or _label_fault(labels),
    )


def _label_fault(labels: Mapping[str, str]) -> str | None:
    """Return what is wrong with the labels of ours: a typo must not move a node elsewhere."""
    for name, value in sorted(labels.items()):
        if name.startswith(LABEL_PREFIX) and name not in LABELS:
            (nearest,) = difflib.get_close_matches(name, LABELS, n=1, cutoff=0.0)
            return f"unknown label {name} (nearest known label: {nearest})"
        if name in LABELS and "/" in value:
            return f"label {name}={value} contains a slash"
    return None
