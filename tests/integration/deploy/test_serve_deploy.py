"""The Serve configuration as it lies in the repository, deployed, updated and shut down with the
`serve` command on a Ray cluster of several nodes whose labels come from a table of switches."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.config import BUNDLED_MODEL, merge
from cluster.ray_plane import NAMESPACE, find_controller
from deploy.node_labels import from_table
from deploy.ports import free_port
from tests.integration.deploy.launcher import Footprint, wait_until
from tests.integration.deploy.test_lifecycle import name

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[3]
MANIFESTS = ROOT / "deploy" / "manifests"
NAME = name("serve")
READY_S = 90.0
# The model, and GPUs that exist on paper: everything else is the file's.
SMALL: dict[str, Any] = {
    "cluster": {"name": NAME, "drain_s": 1.0},
    "model": {
        "path": str(BUNDLED_MODEL),
        "engine": "simulated",
        "max_model_len": 512,
        "block_size": 16,
    },
    "prefill": {"workers": 1},
    "decode": {"workers": 1},
    "router": {"replicas": 1},
    "autoscaler": {"min_prefill": 1, "min_decode": 1},
}


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Run a head for the routers and a node for each pool; yield the dashboard's address."""
    port = free_port()
    memory = {"object_store_memory": 100 << 20}
    switches = yaml.safe_load((MANIFESTS / "cluster-launcher" / "switches.yaml").read_text())
    head = {"include_dashboard": True, "dashboard_port": port, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "resources": {"tandem-router": 2}, **head, **memory},
    )
    for host in ("gpu-21", "gpu-31"):
        labels = from_table(switches, host)
        cluster.add_node(num_cpus=32, num_gpus=8, labels=labels, **memory)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()
    cluster.shutdown()


class Site:
    """The configuration file as an operator edits it, and the endpoint."""

    def __init__(self, dashboard: str, folder: Path) -> None:
        self._dashboard = dashboard
        self._file = folder / "tandem.yaml"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def serve(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.serve.scripts", *arguments, "-a", self._dashboard]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def deploy(self, **changes: Any) -> None:
        document = yaml.safe_load((MANIFESTS / "serve" / "tandem.yaml").read_text())
        document["http_options"] = {"host": "127.0.0.1", "port": self._port}
        (app,) = document["applications"]
        app["args"] = merge(merge(app["args"], SMALL), changes)
        # It replaces the section: the simulated engine knows a few settings only.
        app["args"]["model"] = {**SMALL["model"], **changes.get("model", {})}
        self._file.write_text(yaml.safe_dump(document))
        self.serve("deploy", str(self._file))

    def answers(self) -> bool:
        body = {"model": BUNDLED_MODEL.name, "prompt": "In the beginning", "max_tokens": 4}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=10.0)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and "x-tandem-prefill-worker" in answer.headers


@pytest.fixture(scope="module")
def site(dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(dashboard, tmp_path_factory.mktemp("site"))
    site.deploy()
    wait_until(site.answers, READY_S, "the endpoint answers")
    return site


def status() -> dict[str, Any]:
    document: dict[str, Any] = ray.get(find_controller(NAME).status.remote())
    return document


def ready(role: str) -> dict[str, str]:
    """Return the nodes of the workers that serve, by worker."""
    workers = [w for w in status()["workers"] if w["state"] == "ready" and w["role"] == role]
    return {w["worker_id"]: w["node"] for w in workers}


def marks() -> set[str]:
    """Return the marks of the app's processes: each `serve deploy` makes one."""
    found = set()
    for process in psutil.process_iter():
        try:
            mark = process.environ().get("TANDEM_DEPLOYMENT", "")
        except psutil.Error:
            continue
        if mark.startswith(f"{NAME}:"):
            found.add(mark)
    return found


def test_each_pool_is_on_the_node_of_its_gpu_type(site: Site) -> None:
    types = {node["NodeID"]: node["Labels"].get("tandem/gpu-type") for node in ray.nodes()}
    assert [types[node] for node in ready("prefill").values()] == ["H100"]
    assert [types[node] for node in ready("decode").values()] == ["H200"]
    groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
    assert [g["bundles"] for g in groups] == [{0: {"CPU": 8.0, "GPU": 2.0}}] * 2


def test_what_can_change_live_takes_effect_without_a_restart(site: Site) -> None:
    before = ready("decode")
    site.deploy(decode={"workers": 2}, autoscaler={"ratio": "1:2"})
    wait_until(lambda: len(ready("decode")) == 2, READY_S, "the second decode worker")
    assert before.items() <= ready("decode").items()
    events = [event for _, event in status()["events"]]
    assert "deployed: decode.workers 1 -> 2; autoscaler.ratio 1:1 -> 1:2" in events
    wait_until(site.answers, READY_S, "the endpoint answers")


def test_what_cannot_is_refused_with_the_reason_and_nothing_stops(site: Site) -> None:
    before = ready("prefill") | ready("decode")
    site.deploy(decode={"workers": 1}, model={"chunk_tokens": 64})
    reason = "model.chunk_tokens 2048 -> 64: needs other workers"
    wait_until(lambda: reason in (status()["refused"] or ""), READY_S, "it is refused")
    wait_until(site.answers, READY_S, "the endpoint answers")
    assert ready("prefill") | ready("decode") == before


def test_an_operator_on_a_node_sizes_it_by_hand(site: Site) -> None:
    def tandem(*words: str) -> str:
        where = ("--name", NAME, "--address", ray.get_runtime_context().gcs_address)
        command = [sys.executable, "-m", "deploy.cli", *words, *where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "pools are held at 1P2D" in tandem("scale", "--decode", "2")
    assert "desired 1P2D" in (shown := tandem("status")) and "sizes held by hand" in shown
    assert "no longer held" in tandem("scale", "--auto")


def test_a_controller_that_comes_back_keeps_what_was_deployed(site: Site) -> None:
    before = status()["epoch"]
    ray.kill(find_controller(NAME), no_restart=False)

    def is_another() -> bool:
        with suppress(ray.exceptions.RayError):
            return bool(status()["epoch"] > before)
        return False

    wait_until(is_another, READY_S, "the next controller")
    assert status()["desired"] == {"prefill": 1, "decode": 2}
    wait_until(lambda: len(ready("decode")) == 2, READY_S, "it has taken the workers over")


def test_shutdown_leaves_nothing(site: Site) -> None:
    footprints = [Footprint.marked(mark) for mark in marks()]
    assert sum(len(each.pids) for each in footprints) >= 5, "a router, a controller, three workers"
    site.serve("shutdown", "-y")
    wait_until(lambda: ray.util.list_named_actors(all_namespaces=True) == [], 60.0, "no actors")
    wait_until(lambda: [f.leftovers() for f in footprints] == [[]] * len(footprints), 20.0, "gone")
    assert marks() == set()
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
