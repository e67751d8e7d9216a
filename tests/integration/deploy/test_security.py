"""A deployment with everything that keeps strangers out: keys, TLS, CURVE, loopback."""

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families
from zmq.utils import z85

from cluster.keyring import Keyring, parse_keyring
from cluster.messages import CODEC, Cancel
from cluster.names import RequestId
from deploy.access import trust_in
from deploy.processes import find_marked
from deploy.state import DeploymentState
from router.api_keys import digest_of
from tests.integration.deploy.launcher import STOP_S, Footprint, Launcher, serving
from tests.served import wait_until

pytestmark = pytest.mark.timeout(300)

OVERLAP_S = 1.0
SMALL = ("--model.max_model_len", "512", "--model.block_size", "16")


@dataclass
class Secured:
    """A running deployment, its files, and a client with its operator's key."""

    launcher: Launcher
    footprint: Footprint
    keys_file: str
    client: httpx.Client

    def complete(self, **headers: str) -> httpx.Response:
        body = {"model": "tandem-tiny", "prompt": [1, 2, 3] * 20, "max_tokens": 8}
        return self.client.post("/v1/completions", json=body, headers=headers)

    def refused(self) -> dict[str, float]:
        """Return the peers that each worker has refused, by worker and cause."""
        found = {}
        for target in self.client.get("/admin/targets").json():
            if target["labels"]["component"] != "worker":
                continue
            text = httpx.get(f"http://{target['targets'][0]}/metrics").text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == "tandem_peers_refused_total":
                        name = f"{target['labels']['worker_id']} {sample.labels['cause']}"
                        found[name] = sample.value
        return found


def keys(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run `tandem keys`."""
    command = [sys.executable, "-m", "deploy.cli", "keys", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, input=text)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def make_certificate(folder: Path) -> tuple[str, str]:
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=api.example.com", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    certificate, key = make_certificate(folder)
    operator = secrets.token_urlsafe(32)
    (folder / "operator").write_text(operator)
    launcher = Launcher(
        f"t-secured-{os.getpid()}",
        flags=(
            *SMALL,
            *("--security.api_keys", str(folder / "keys.yaml")),
            *("--security.operator_key", str(folder / "operator")),
            *("--security.tls_cert", certificate, "--security.tls_key", key),
            *("--security.key_overlap_s", str(OVERLAP_S)),
        ),
    )
    keys_file = str(folder / "keys.yaml")
    keys("api", "ops", "--admin", "--stdin", "--file", keys_file, text=operator)
    with (
        serving(launcher) as footprint,
        httpx.Client(
            base_url=launcher.url.replace("http:", "https:"),
            verify=trust_in(certificate),
            headers=bearer(operator),
            timeout=30,
        ) as client,
    ):
        yield Secured(launcher, footprint, keys_file, client)


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return (mapped or parsed).is_loopback


def test_only_loopback_is_listened_on(secured: Secured) -> None:
    state = DeploymentState.read(secured.launcher.name)
    assert state is not None
    pids = {process.pid for process in find_marked(state.mark)} | {state.launcher.pid}
    listening = set()
    for c in psutil.net_connections("tcp"):
        if c.pid in pids and c.status == psutil.CONN_LISTEN and c.laddr:
            # One that HAProxy has replaced meanwhile listens no more.
            with suppress(psutil.NoSuchProcess):
                name = psutil.Process(c.pid).name()
                listening.add((name, c.laddr.ip, c.laddr.port, c.pid))
    assert ("haproxy", secured.launcher.port) in {(name, port) for name, _, port, _ in listening}
    outside = [each for each in listening if not is_loopback(each[1])]
    # Of each Serve replica, for calls between deployments: Ray has no setting for it.
    assert all(name.startswith("ray::ServeReplica:") for name, *_ in outside), outside
    assert len({pid for *_, pid in outside}) == len(outside) == 1
    with grpc.insecure_channel(f"127.0.0.1:{outside[0][2]}") as channel:
        ask = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_keys_open_the_endpoint_and_appear_nowhere(secured: Secured) -> None:
    made = keys("api", "app", "--file", secured.keys_file)
    key = made.stdout.strip()
    assert key not in made.stderr
    assert secured.complete().status_code == 200
    wait_until(lambda: secured.complete(**bearer(key)).status_code == 200, 5, "a key added counts")
    assert secured.client.get("/admin/state", headers=bearer(key)).status_code == 403
    assert secured.client.get("/admin/state").status_code == 200
    nobody = secured.complete(**bearer("x" * 40))
    assert nobody.status_code == 401 and nobody.json()["error"]["code"] == 401
    assert secured.client.get("/health", headers=bearer("x")).status_code == 200
    decisions = secured.launcher.run("decisions")
    assert decisions.returncode == 0, decisions.stderr
    keys("drop", "app", "--file", secured.keys_file)
    wait_until(lambda: secured.complete(**bearer(key)).status_code == 401, 5, "a key dropped")
    assert_nowhere(secured, key, digest_of(key), secured.client.headers["authorization"][7:])


def assert_nowhere(secured: Secured, *secret: str) -> None:
    """Fail if one of these is in a command line, an environment or a file of the deployment."""
    wanted = [each.encode() for each in secret]
    for process in find_marked(secured.footprint.mark):
        for what in ("cmdline", "environ"):
            try:
                text = Path(f"/proc/{process.pid}/{what}").read_bytes()
            except OSError:
                continue
            assert not any(each in text for each in wanted), f"{what} of {process.pid}"
    assert secured.footprint.temp_dir is not None
    for path in Path(secured.footprint.temp_dir).rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not any(each in text for each in wanted), path
    assert not any(each in secured.launcher.read().encode() for each in wanted)


_PRINT_RING = """
import sys
from cluster.config import ClusterSection
from deploy.controller_link import controller_of
with controller_of(ClusterSection(name=sys.argv[1])) as link:
    print(link._ray.get(link._actor.keys.remote()).as_text())
"""


def ring_of(name: str) -> Keyring:
    """Return the CURVE keys of a deployment, as its routers get them."""
    command = [sys.executable, "-c", _PRINT_RING, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_keyring(done.stdout[done.stdout.index("# CURVE") :].encode())


def test_strangers_get_nowhere_and_new_keys_are_taken_on_under_load(secured: Secured) -> None:
    status = secured.client.get("/admin/state").json()
    before = secured.refused()
    with zmq.Context() as context, ExitStack() as stack:
        for worker in status["workers"]:
            stranger = stack.enter_context(context.socket(zmq.DEALER))
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(worker["endpoint"])
            stranger.send(CODEC.encode(Cancel(RequestId("r"))))
        wait_until(
            lambda: all(
                secured.refused()[f"{worker['worker_id']} protocol"]
                > before[f"{worker['worker_id']} protocol"]
                for worker in status["workers"]
            ),
            10,
            "every worker has counted the stranger",
        )
    ring = ring_of(secured.launcher.name)
    statuses, is_over = [], threading.Event()

    def load() -> None:
        while not is_over.is_set():
            statuses.append(secured.complete().status_code)

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        keys("rotate", "--name", secured.launcher.name)
        wait_until(
            lambda: (
                (now := ring_of(secured.launcher.name)).used != ring.used and len(now.pairs) == 1
            ),
            40,
            "the old key is gone",
        )
    finally:
        is_over.set()
        for client in clients:
            client.join()
    assert len(statuses) > 10 and set(statuses) == {200}
    assert secured.complete().status_code == 200
    after = secured.client.get("/admin/state").json()
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in status["workers"]]
    for pair in (*ring, *ring_of(secured.launcher.name)):
        assert_nowhere(secured, pair.secret.decode(), z85.decode(pair.secret).hex())


def test_down_stops_it_and_leaves_nothing(secured: Secured) -> None:
    """Last: ends the deployment."""
    began = time.monotonic()
    down = secured.launcher.run("down")
    assert down.returncode == 0 and "stopped" in down.stdout
    assert time.monotonic() - began < STOP_S
    assert secured.footprint.leftovers() == []
