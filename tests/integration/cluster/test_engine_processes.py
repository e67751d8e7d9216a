"""The processes of a real engine: a clean stop is quick, and none outlives its owner."""

import json
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from cluster import config
from tests.waiting import wait_for


@pytest.fixture
def host() -> Iterator["subprocess.Popen[str]"]:
    if not (config.BUNDLED_MODEL / "model.safetensors").exists():
        pytest.skip(f"{config.BUNDLED_MODEL} has no weights; train it with deploy.models.train")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.cluster.engine_host"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def _line(host: "subprocess.Popen[str]") -> dict[str, list[int] | float]:
    """Return the next JSON line; vLLM may print others."""
    assert host.stdout is not None and host.stderr is not None
    for line in host.stdout:
        if line.startswith("{"):
            document: dict[str, list[int] | float] = json.loads(line)
            return document
    raise AssertionError(f"the engine's host ended:\n{host.stderr.read()[-4000:]}")


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_clean_stop_is_quick_and_leaves_nothing(host: "subprocess.Popen[str]") -> None:
    pids = _line(host)["pids"]
    assert isinstance(pids, list) and len(pids) >= 2
    host.stdin.write("stop\n")  # type: ignore[union-attr]
    host.stdin.flush()  # type: ignore[union-attr]
    cost = _line(host)
    assert all(_is_gone(pid) for pid in pids)
    _, errors = host.communicate(timeout=60)
    assert host.returncode == 0, errors[-4000:]
    # After its time is up vLLM kills what is left, and its shared memory leaks.
    assert "force killing" not in errors and "leaked" not in errors, errors[-4000:]
    assert isinstance(cost["cpu_s"], float) and isinstance(cost["wall_s"], float)
    # Wall time is these CPU seconds only where nothing else wants the cores.
    assert cost["cpu_s"] < 2.0, cost
    assert cost["wall_s"] < 8.0, cost


def test_a_killed_owner_takes_its_engine_along(host: "subprocess.Popen[str]") -> None:
    pids = _line(host)["pids"]
    assert isinstance(pids, list)
    host.kill()
    wait_for(lambda: all(_is_gone(pid) for pid in pids), 1.0)
