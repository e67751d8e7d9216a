"""`tandem serve --address`: on a Ray cluster of two nodes that goes on without us."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import zmq
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.config import parse_config
from cluster.controller_store import ControllerStore
from cluster.names import Role, WorkerId
from cluster.ray_plane import NAMESPACE, RayLauncher
from cluster.ray_store import RayStore
from cluster.worker_spec import WorkerSpec
from deploy.app import parts_of
from deploy.cli import main as tandem
from deploy.ports import free_port
from deploy.serve_app import build
from tests.integration.deploy.launcher import STOP_S, Launcher, serving, wait_until
from tests.integration.deploy.test_lifecycle import name

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one core each, so that the two workers land on different ones."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20}
    )
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def actors() -> list[str]:
    """Return the named actors of the cluster, Serve's own excepted."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def test_workers_on_two_nodes_hand_over_by_curve_and_tcp_and_sigterm_takes_only_ours(
    cluster: Cluster, tmp_path: Path
) -> None:
    keys = str(tmp_path / "curve")
    assert tandem(["keys", "curve", "--file", keys]) == 0
    flags = ("--handoff.transports", "tcp", "--security.curve_keys", keys)
    launcher = Launcher(name("attach"), flags=("--address", cluster.address, *flags))
    with serving(launcher) as footprint:
        answer = launcher.complete()
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tandem-prefill-worker"] == "prefill-1"
        path = f"/admin/requests/{answer.headers['x-request-id']}"
        (sequence,) = httpx.get(f"{launcher.url}{path}").json()["sequences"]
        assert sequence["transport"] == "tcp"
        assert sequence["received_bytes"] == sequence["produced_bytes"] > 0
        assert_strangers_are_refused(launcher)
        ours = [f"{launcher.name}-{part}" for part in ("controller", "decode-1", "prefill-1")]
        assert actors() == ours
        seats = [ray.get_actor(name, namespace=NAMESPACE).seat.remote() for name in ours[1:]]
        assert len({seat.node for seat in ray.get(seats)}) == 2

        assert launcher.signal(signal.SIGTERM) == 0, launcher.log
        assert actors() == []
        assert footprint.leftovers() == []
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2


def assert_strangers_are_refused(launcher: Launcher) -> None:
    """Connect to every worker without a key, and find it counted there."""
    workers = httpx.get(f"{launcher.url}/admin/state").json()["workers"]
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        for worker in workers:
            stranger = stack.enter_context(context.socket(zmq.DEALER))
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(worker["endpoint"])
        for target in httpx.get(f"{launcher.url}/admin/targets").json():
            if target["labels"]["component"] == "worker":
                exporter = f"http://{target['targets'][0]}/metrics"
                wait_until(lambda url=exporter: _num_refused(url) > 0, 10.0, exporter)  # type: ignore[misc]


def _num_refused(exporter: str) -> float:
    text = httpx.get(exporter).text
    wanted = 'tandem_peers_refused_total{cause="protocol"}'
    (line,) = (line for line in text.splitlines() if line.startswith(wanted))
    return float(line.split()[-1])


def test_down_removes_what_a_killed_launcher_left_in_the_cluster(cluster: Cluster) -> None:
    launcher = Launcher(name("left"), flags=("--address", cluster.address))
    with serving(launcher) as footprint:
        launcher.signal(signal.SIGKILL)
        assert launcher.complete().status_code == 200, "detached actors outlive the launcher"
        started_at = time.monotonic()
        assert "cleaned up after" in launcher.run("down").stdout
        assert time.monotonic() - started_at < 2 * STOP_S
        assert actors() == []
        wait_until(lambda: footprint.leftovers() == [], 5.0, "nothing of ours is left")


def test_an_app_that_serve_deploys_brings_its_controller_and_takes_it_along(
    cluster: Cluster,
) -> None:
    deployment = name("app")
    model = {"engine": "simulated", "max_model_len": 512, "block_size": 16}
    app = build({"cluster": {"name": deployment}, "model": model})
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    serve.run(app, name=deployment, route_prefix="/", _local_testing_mode=False)
    try:
        ours = [f"{deployment}-{part}" for part in ("controller", "decode-1", "prefill-1")]
        wait_until(lambda: actors() == ours, 60.0, "controller and workers")
    finally:
        serve.delete(deployment)
    wait_until(lambda: actors() == [], 30.0, "everything is gone with the app")
    groups = placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
    serve.shutdown()


def test_a_worker_outlives_its_controller_and_not_its_deployment(cluster: Cluster) -> None:
    deployment = name("orphan")
    config = parse_config(
        {
            "cluster": {"name": deployment, "orphan_s": 2.0},
            "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
        }
    )
    notes = ControllerStore(RayStore(), deployment)
    notes.save("sizes", {"prefill": 1, "decode": 1})
    parts, worker_id = parts_of(config), WorkerId("decode-1")
    spec = WorkerSpec(worker_id, Role.DECODE, parts.engine, parts.roles, config, (0,), "127.0.0.1")
    worker = RayLauncher(config, {}).launch(worker_id, Role.DECODE, None)
    try:
        asyncio.run(worker.start(spec, 1))
        time.sleep(3 * config.cluster.orphan_s)  # no controller, but its notes: it must stay
        assert actors() == [f"{deployment}-decode-1"]
        notes.clear()
        wait_until(lambda: actors() == [], 5 * config.cluster.orphan_s, "it ends by itself")
    finally:
        worker.kill()


def test_no_cluster_there_is_one_clear_line() -> None:
    launcher = Launcher(name("nowhere"))
    refused = launcher.run("serve", "--simulated", "--address", "127.0.0.1:1")
    assert refused.returncode == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in refused.stderr.splitlines()[-1]
