"""The labels a Ray node starts with: where it stands in the network, from what its cloud says.

    python -m deploy.node_labels kubernetes --node NAME --out FILE   # labels of a Kubernetes node
    aws ec2 describe-instance-topology ... | python -m deploy.node_labels aws --out FILE
    python -m deploy.node_labels table --table FILE --host NAME --out FILE   # on your own premises

FILE is what `ray start --labels-file` takes. `cluster/topology.py` reads the labels again.
"""

import argparse
import hashlib
import json
import re
import ssl
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import TandemError
from cluster.topology import (
    GPU_TYPE_LABEL,
    LABELS,
    LOGICAL_CLUSTER_LABEL,
    S0_LABEL,
    S1_LABEL,
    S2_LABEL,
)

_AWS = "topology.k8s.aws/network-node-layer-"
_NVIDIA = "network.topology.nvidia.com/"
_GOOGLE = "cloud.google.com/gce-topology-"
# Who names switches, the most trustworthy first, each with its labels for S0, S1 and S2. One
# source is taken for all three: a tree made of two would join nodes that are far apart.
SWITCHES = (
    (S0_LABEL, S1_LABEL, S2_LABEL),
    (f"{_NVIDIA}accelerator", f"{_NVIDIA}leaf", f"{_NVIDIA}spine"),
    # Amazon numbers from the top; the highest number there is stands beside the instance.
    (None, f"{_AWS}4", f"{_AWS}3"),
    (None, f"{_AWS}3", f"{_AWS}2"),
    (None, f"{_GOOGLE}subblock", f"{_GOOGLE}block"),
)
CLUSTERS = (LOGICAL_CLUSTER_LABEL, "topology.kubernetes.io/zone")
GPU_TYPES = (GPU_TYPE_LABEL, "nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_API = "https://kubernetes.default.svc/api/v1/nodes/"
_TIMEOUT_S = 10.0
_MAX_CHARS = 63
_DIGEST_CHARS = 8


def ray_labels(node: Mapping[str, str]) -> dict[str, str]:
    """Return our labels for a node with these labels of its cluster; what is unknown is left out.

    A node without any stands in the default domain.
    """
    found: dict[str, str] = {}
    for source in SWITCHES:
        if source[1] in node:
            ours = zip((S0_LABEL, S1_LABEL, S2_LABEL), source, strict=True)
            found = {label: node[name] for label, name in ours if name is not None and name in node}
            break
    for label, names in ((LOGICAL_CLUSTER_LABEL, CLUSTERS), (GPU_TYPE_LABEL, GPU_TYPES)):
        if (name := next((each for each in names if each in node), None)) is not None:
            found[label] = node[name]
    return {label: as_label_value(value) for label, value in found.items() if value}


def as_label_value(text: str) -> str:
    """Return `text` as Ray takes a label's value, still different for different texts."""
    value = re.sub(r"[^A-Za-z0-9_.-]", "-", text).strip("-_.")
    if value == text and len(value) <= _MAX_CHARS:
        return value
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]
    kept = value[: _MAX_CHARS - _DIGEST_CHARS - 1].rstrip("-_.")
    return f"{kept}-{digest}".lstrip("-")


def from_instance_topology(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return an instance's labels from what `describe-instance-topology` answered for it."""
    instances = answer["Instances"]
    if len(instances) != 1:
        raise TandemError(f"the topology of one instance is needed, not of {len(instances)}")
    (instance,) = instances
    # From the top down, as in the labels of Kubernetes.
    layers = {f"{_AWS}{n}": name for n, name in enumerate(instance.get("NetworkNodes", ()), 1)}
    return ray_labels({**layers, CLUSTERS[1]: instance["AvailabilityZone"]})


def from_table(table: object, host: str) -> dict[str, str]:
    """Return the labels that `table` has for `host`; the short names are without `tandem/`."""
    row = table.get(host) if isinstance(table, Mapping) else None
    if not isinstance(row, Mapping):
        raise TandemError(f"the table of switches has no row for the host {host!r}: add one")
    named = {f"tandem/{name}": str(value) for name, value in row.items()}
    if unknown := sorted(named.keys() - set(LABELS)):
        raise TandemError(
            f"host {host!r}: unknown {', '.join(unknown)}; known: {', '.join(LABELS)}"
        )
    return ray_labels(named)


def node_from_kubernetes(name: str) -> dict[str, str]:
    """Return the labels of a Kubernetes node, asked of the API with the pod's own account."""
    token = (_SERVICE_ACCOUNT / "token").read_text()
    request = urllib.request.Request(_API + name, headers={"authorization": f"Bearer {token}"})
    trust = ssl.create_default_context(cafile=str(_SERVICE_ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=trust) as answer:
        labels: dict[str, str] = json.load(answer)["metadata"].get("labels", {})
    return labels


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the label file; return 1 with one line said if the labels cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m deploy.node_labels", description=__doc__)
    parser.add_argument("source", choices=("kubernetes", "aws", "table"))
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--node", default="", help="kubernetes: the node's name")
    parser.add_argument("--table", type=Path, help="table: YAML, {host: {s1: ..., s2: ...}}")
    parser.add_argument("--host", default="", help="table: the host's name in it")
    parsed = parser.parse_args(arguments)
    try:
        labels = _labels(parsed)
    except (TandemError, OSError, KeyError, ValueError, yaml.YAMLError) as error:
        print(f"error: no labels from {parsed.source}: {error}", file=sys.stderr)
        return 1
    parsed.out.write_text(yaml.safe_dump(labels))
    print(f"{parsed.out}: {labels}")
    return 0


def _labels(parsed: argparse.Namespace) -> dict[str, str]:
    if parsed.source == "kubernetes":
        return ray_labels(node_from_kubernetes(parsed.node))
    if parsed.source == "aws":
        return from_instance_topology(json.load(sys.stdin))
    return from_table(yaml.safe_load(parsed.table.read_text()), parsed.host)


if __name__ == "__main__":
    sys.exit(main())
