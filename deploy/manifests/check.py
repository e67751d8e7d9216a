"""Holds manifests against schemas, and what is embedded in them against what will read it.

    python -m deploy.manifests.check [--crd FILE] FILE...

Kubernetes' own kinds and RayService against `schemas/`, a Serve configuration against Ray Serve's
model and ours, a cluster launcher's file against Ray's. `--crd` names the definition of RayService
that a cluster has, as `kubectl get crd rayservices.ray.io -o yaml` prints it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from referencing import Registry, Resource

from cluster.config import TandemConfig, parse_config
from cluster.errors import ConfigError

SCHEMAS = Path(__file__).with_name("schemas")
SERVE_APP = "deploy.serve_app:build"
_RAY_SERVICE = "ray.io/v1/RayService"


def faults(document: Mapping[str, Any], crd: Mapping[str, Any] | None = None) -> list[str]:
    """Return what is wrong with one manifest, each fault with its place; empty if nothing is."""
    if "apiVersion" not in document:
        is_serve = "applications" in document
        return list(serve_faults(document) if is_serve else launcher_faults(document))
    kind = f"{document['apiVersion']}/{document.get('kind')}"
    if kind == _RAY_SERVICE:
        schema = schema_of_crd(crd or _read("rayservice.json"), "v1")
        found = [_line(error) for error in Draft202012Validator(schema).iter_errors(document)]
        return found or list(ray_service_faults(document))
    reference = _reference(kind)
    if reference is None:
        return [f"no schema for {kind}"]
    return [_line(error) for error in _validator(reference).iter_errors(document)]


def serve_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what Ray Serve, or our app's configuration tree, would refuse."""
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        yield from (f"{_path(each['loc'])}: {each['msg']}" for each in error.errors())
        return
    try:
        configurations(document)
    except ConfigError as error:
        yield f"args: {error}"


def configurations(document: Mapping[str, Any]) -> list[TandemConfig]:
    """Return the configurations of the apps of ours in a Serve configuration."""
    apps = document["applications"]
    return [parse_config(app.get("args")) for app in apps if app["import_path"] == SERVE_APP]


def ray_service_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the readers of a RayService's parts would refuse."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    yield from serve_faults(yaml.safe_load(document["spec"]["serveConfigV2"]))
    cluster = {"metadata": document["metadata"], "spec": document["spec"]["rayClusterConfig"]}
    try:
        autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    except Exception as error:  # whatever a field that it did not expect makes of it
        yield f"Ray's autoscaler cannot read rayClusterConfig: {error}"


def launcher_faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `ray up` would refuse: it fills in defaults and validates the result."""
    from ray.autoscaler._private import util

    try:
        util.validate_config(util.prepare_config(dict(document)))
    except (Exception, SystemExit) as error:  # jsonschema's, Ray's, or its way to end a command
        yield f"Ray's cluster launcher: {str(error).partition(chr(10))[0]}"


def schema_of_crd(crd: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return the schema in a custom resource definition, refusing unknown fields."""
    (found,) = [each for each in crd["spec"]["versions"] if each["name"] == version]
    schema: dict[str, Any] = _closed(found["schema"]["openAPIV3Schema"])
    # Whatever every object has is not spelled out there.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _closed(schema: Any) -> Any:
    """Kubernetes drops fields that it does not know; here they are mistakes."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_open = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        return closed if is_open else {**closed, "additionalProperties": False}
    return closed


def _reference(kind: str) -> str | None:
    group_version, _, name = kind.rpartition("/")
    for definition, schema in _read("kubernetes.json")["$defs"].items():
        for each in schema.get("x-kubernetes-group-version-kind", ()):
            prefix = f"{each['group']}/" if each["group"] else ""
            if (f"{prefix}{each['version']}", each["kind"]) == (group_version, name):
                return f"kubernetes.json#/$defs/{definition}"
    return None


@cache
def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SCHEMAS / name).read_text())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def _validator(reference: str) -> Draft202012Validator:
    kubernetes = Resource.from_contents(_read("kubernetes.json"))
    registry = Registry().with_resource("kubernetes.json", kubernetes)
    return Draft202012Validator({"$ref": reference}, registry=registry)


def _line(error: Any) -> str:
    return f"{_path(error.absolute_path)}: {error.message}"


def _path(parts: Sequence[object]) -> str:
    return ".".join(map(str, parts)) or "(top)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every fault with its file; return 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m deploy.manifests.check")
    parser.add_argument("--crd", type=Path, help="custom resource definition of RayService")
    parser.add_argument("files", type=Path, nargs="+")
    parsed = parser.parse_args(arguments)
    crd = yaml.safe_load(parsed.crd.read_text()) if parsed.crd else None
    num_faults = 0
    for path in parsed.files:
        for document in yaml.safe_load_all(path.read_text()):
            for fault in faults(document, crd):
                num_faults += 1
                print(f"{path}: {fault}", file=sys.stderr)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
