"""A running deployment sized by hand, explained, replayed and calibrated from its command line, and
cleaned up after once its launcher has been killed."""

import json
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from autoscaler.decision_log import canonical_json
from cluster.config import load_config
from tests.integration.deploy.launcher import Footprint, Launcher, serving
from tests.integration.deploy.test_lifecycle import name

pytestmark = pytest.mark.timeout(400)

# Slow enough that the test's own client is never what limits.
ENGINE = {
    "simulated.decode_step_s": "0.04",
    "simulated.decode_step_per_request_s": "0.004",
    "simulated.prefill_tokens_per_s": "2000",
}
AUTOSCALER = {
    "autoscaler.mode": "advise",
    "autoscaler.target_per_worker": "50",
    "autoscaler.decision_period_s": "1",
    "autoscaler.metric_window_s": "4",
    "autoscaler.soft_in_s": "1",
    "autoscaler.max_prefill": "2",
    "autoscaler.max_decode": "2",
}


def flags(**settings: str) -> tuple[str, ...]:
    return tuple(word for path, value in settings.items() for word in (f"--{path}", value))


def desired(launcher: Launcher) -> dict[str, int]:
    status: dict[str, Any] = json.loads(launcher.run("status", "--json").stdout)
    sizes: dict[str, int] = status["desired"]
    return sizes


def test_scale_decisions_replay_calibrate_down(tmp_path: Path) -> None:
    file, config = tmp_path / "decisions.jsonl", tmp_path / "tandem.yaml"
    settings = {**ENGINE, **AUTOSCALER, "autoscaler.decision_file": str(file)}
    launcher = Launcher(name("operate"), flags=flags(**settings))
    with serving(launcher):
        _sizes_by_hand(launcher)
        _explained(launcher, file)
        _calibrated(launcher, config)
        _down_after_a_kill(launcher)
    assert desired_by(config) == ("1:1", True)


def _sizes_by_hand(launcher: Launcher) -> None:
    refused = launcher.run("scale", "--prefill", "1", "--decode", "3")
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line == "tandem: error: 1P3D is refused: 3 decode workers are above max_decode 2"

    scaled = launcher.run("scale", "--decode", "2", "--wait")
    assert scaled.returncode == 0, scaled.stderr
    assert scaled.stdout.splitlines()[-1] == "1P2D serve"
    status = launcher.run("status").stdout
    assert "desired 1P2D, autoscaler advise, controller epoch 1" in status
    assert "decode-2   decode   ready" in status
    assert launcher.complete().status_code == 200


def _explained(launcher: Launcher, file: Path) -> None:
    shown = launcher.run("decisions")
    assert shown.returncode == 0, shown.stderr
    assert "1P2D -> 1P2D  out  pin  1P1D to 1P2D: by hand" in shown.stdout
    page = httpx.get(f"{launcher.url}/admin/decisions?limit=2").json()
    assert [record["seq"] for record in page["decisions"]] == [1, 2] and page["next"] == 2

    lines = launcher.run("decisions", "--json").stdout.splitlines()
    assert lines == [canonical_json(json.loads(line)) for line in lines]
    head, *written = file.read_text().splitlines()
    assert head.startswith('{"settings":'), "it replays by itself"
    assert written[: len(lines)] == lines, "the API says what the file does"

    same = launcher.run("replay", str(file))
    assert same.returncode == 0, same.stdout
    assert "are identical, byte for byte" in same.stdout
    changed = {"autoscaler.max_decode": "1"}
    other = launcher.run("replay", str(file), *flags(**changed))
    assert other.returncode == 1 and "is the first decision that differs" in other.stdout
    rerun = launcher.run("replay", str(file), "--rerun", *flags(**changed))
    assert rerun.returncode == 0 and "1P2D -> 1P1D" in rerun.stdout

    freed = launcher.run("scale", "--auto")
    assert "they stay (autoscaler.mode is advise)" in freed.stdout


def _calibrated(launcher: Launcher, config: Path) -> None:
    config.write_text("# kept\nmodel:\n  dtype: auto\n")
    done = launcher.run(
        "calibrate",
        *("--total", "2", "--slo-ttft", "0.5", "--slo-tbt", "0.08", "--duration", "2"),
        # Of the gaps between 24 tokens, the one that is the hand-off is more than a hundredth.
        *("--autoscaler.latency_quantile", "0.9"),
        *("--input-tokens", "32", "--output-tokens", "24", "--config-out", str(config)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1P1D" in done.stdout and "held" in done.stdout
    assert config.read_text().startswith("# kept\nmodel:\n  dtype: auto\nautoscaler:\n")
    ElementTree.fromstring(config.with_suffix(".svg").read_text())
    assert desired(launcher) == {"prefill": 1, "decode": 2}, "as before"


def _down_after_a_kill(launcher: Launcher) -> None:
    footprint = Footprint.of(launcher)
    launcher.signal(signal.SIGKILL)
    down = launcher.run("down")
    assert down.returncode == 0 and "cleaned up after" in down.stdout
    assert footprint.leftovers() == []
    assert "no deployment named" in launcher.run("down").stdout


def desired_by(config: Path) -> tuple[str, bool]:
    """Return the ratio that was found, and whether the target is one that a worker can carry.

    A step with n requests takes 40 + 4 n ms: 80 ms at 10, so 125 tokens/s, times the headroom; a
    busy machine takes longer. One request has 23 tokens/s.
    """
    found = load_config(config).autoscaler
    assert found.target_per_worker is not None
    return found.ratio, 15 < found.target_per_worker < 105
