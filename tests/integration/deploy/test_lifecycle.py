"""`tandem serve` from nothing to an answer and back to nothing, whoever ends it.

What `tandem down` leaves is looked at where a deployment has served other tests: of one that runs
in `test_security.py`, of one that was killed in `test_operating.py`.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from deploy.state import DeploymentState
from tests.integration.deploy.launcher import START_S, STOP_S, Launcher, serving, started

pytestmark = pytest.mark.timeout(400)


def name(test: str) -> str:
    """Return a deployment name no other test run on this machine has."""
    return f"t-{test}-{os.getpid()}"


def test_serves_refuses_what_collides_and_ctrl_c_leaves_nothing() -> None:
    launcher = Launcher(name("ctrl-c"))
    with serving(launcher) as footprint:
        answer = launcher.complete()
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-tandem-prefill-worker"] == "prefill-1"
        assert answer.headers["x-tandem-decode-worker"] == "decode-1"
        assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
        assert "engine pinned to core(s)" in launcher.log
        assert footprint.temp_dir is not None
        assert Path(footprint.temp_dir).stat().st_mode & 0o777 == 0o700, "holds Ray's token"
        assert not {9101, 8404} & footprint.ports, "HAProxy's extra listeners"

        status = launcher.run("status")
        assert status.returncode == 0, status.stderr
        assert "healthy" in status.stdout and "decode-1   decode   ready" in status.stdout

        same_name = launcher.run("serve", "--simulated", "--port", "1")
        assert same_name.returncode == 1
        (line,) = same_name.stderr.splitlines()
        assert f"{launcher.name!r} already runs at {launcher.url}" in line

        same_port = Launcher(name("other")).run(
            "serve", "--simulated", "--port", str(launcher.port)
        )
        assert same_port.returncode == 1
        (line,) = same_port.stderr.splitlines()
        assert f"port {launcher.port} on 127.0.0.1 is taken by haproxy" in line

        assert launcher.process is not None
        # A terminal's Ctrl-C reaches the whole foreground group, not the launcher alone.
        os.killpg(launcher.process.pid, signal.SIGINT)
        assert launcher.process.wait(STOP_S) == 0, launcher.read()
        assert footprint.leftovers() == []
        assert DeploymentState.read(launcher.name) is None


def test_the_next_serve_cleans_up_after_a_killed_one_and_sigterm_stops_it() -> None:
    launcher = Launcher(name("killed"))
    with serving(launcher) as killed:
        launcher.signal(signal.SIGKILL)
        again = Launcher(launcher.name, launcher.port)
        with serving(again) as footprint:
            assert killed.leftovers() == []
            assert "cleaned up after an earlier" in again.log
            assert again.complete().status_code == 200
            assert again.signal(signal.SIGTERM) == 0, again.log
            assert footprint.leftovers() == []


@pytest.mark.parametrize("said", ["Ray is up", "starts, engine pinned"])
def test_an_interrupted_start_leaves_nothing(said: str) -> None:
    launcher = Launcher(name("early"))
    with started(launcher):
        launcher.wait_until(said)
        state = DeploymentState.read(launcher.name)
        assert state is not None and state.temp_dir is not None
        assert launcher.signal(signal.SIGINT) == 0, launcher.log
        assert not Path(state.temp_dir).exists()
        assert DeploymentState.read(launcher.name) is None


def test_a_start_that_cannot_succeed_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    launcher = Launcher(name("broken"), flags=("--model", str(tmp_path)))
    with started(launcher) as process:
        assert process.wait(START_S) == 1, launcher.read()
        error = launcher.read().splitlines()[-1]
        assert error.startswith("tandem: error: ") and "vocab_size" in error
        assert DeploymentState.read(launcher.name) is None


def test_a_port_that_is_only_bound_is_taken_too() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        started_at = time.monotonic()
        refused = Launcher(name("bound")).run("serve", "--simulated", "--port", str(port))
    assert refused.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in refused.stderr
    # Before anything is started.
    assert time.monotonic() - started_at < 10.0
