"""Two plain deployments on a real Ray Serve, sized together by what their replicas count."""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from autoscaler.decision import Action
from autoscaler.recording import Recording
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.timeout(300),
    # Nothing else sets how often replicas report, and ten seconds are long for a test.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("Prefill", "Decode")
REQUESTS_PER_S = 10.0
# Per request: far more than one replica's share and far less, however few the machine answers.
MANY_TOKENS, FEW_TOKENS = 10_000, 1


@pytest.fixture(scope="module")
def logs() -> Iterator[Path]:
    """A private Ray with Serve on it, without a proxy; yields the folder of Serve's logs."""
    folder = tempfile.TemporaryDirectory(prefix="td-", ignore_cleanup_errors=True)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    context: Any = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        _temp_dir=folder.name,
    )
    serve.start(proxy_location="Disabled")
    yield Path(context.address_info["session_dir"]) / "logs" / "serve"
    serve.shutdown()
    ray.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    folder.cleanup()


def deploy(decisions: Path, prefill_delay_s: float = 0.0) -> None:
    """Deploy the application as `serve deploy` does from a file."""
    autoscaler = {
        "target_per_worker": 120.0,
        "speedup": 60.0,
        "metric_window_s": 600.0,
        "decision_file": str(decisions),
    }
    delays = {"Prefill": prefill_delay_s, "Decode": 0.0}
    application = {
        "name": "pd",
        "import_path": "tests.integration.autoscaler.pd_app:app",
        "autoscaling_policy": {
            "policy_function": "autoscaler.serve_policy:PrefillDecodePolicy",
            "policy_kwargs": {"prefill": "Pre*", "decode": "Decode", "autoscaler": autoscaler},
        },
        "deployments": [
            {
                "name": name,
                "autoscaling_config": {
                    "min_replicas": 1,
                    "max_replicas": 2,
                    "upscale_delay_s": delays[name],
                    "downscale_delay_s": 0.0,
                    "look_back_period_s": 5.0,
                    "metrics_interval_s": 0.5,
                },
            }
            for name in NAMES
        ],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    _get_global_client().deploy_apps(schema, _blocking=False)


def running() -> tuple[int, ...]:
    """Return how many replicas (prefill, decode) serve."""
    app = serve.status().applications.get("pd")
    deployments = {} if app is None else app.deployments
    states = [deployments[name].replica_states if name in deployments else {} for name in NAMES]
    return tuple(each.get("RUNNING", 0) for each in states)


def targets() -> tuple[int, ...]:
    """Return the sizes (prefill, decode) that Serve is after, both read at one moment."""
    deployments = _get_global_client().get_serve_details()["applications"]["pd"]["deployments"]
    return tuple(deployments[name]["target_num_replicas"] for name in NAMES)


@dataclass
class Load:
    """Requests at a steady rate, however long Serve takes to answer them or anything else."""

    handle: Any
    seen: list[tuple[int, ...]] = field(default_factory=list)
    _began_s: float = field(default_factory=time.monotonic)
    _asked: list[tuple[Any, int]] = field(default_factory=list)

    def until(self, sizes: tuple[int, int], output_tokens: int, limit_s: float) -> None:
        """Send requests of so many tokens until so many replicas serve."""
        deadline = time.monotonic() + limit_s
        while running() != sizes:
            assert time.monotonic() < deadline, f"{running()}, not {sizes} after {limit_s} s"
            self.run(0.25, output_tokens)
        self._note()

    def run(self, seconds: float, output_tokens: int) -> None:
        """Send requests of so many tokens and note every pair of sizes on the way."""
        ends_s = time.monotonic() + seconds
        while (now := time.monotonic()) < ends_s:
            num_due = round((now - self._began_s) * REQUESTS_PER_S) - len(self._asked)
            for _ in range(num_due):
                self._asked.append((self.handle.remote(50, output_tokens), output_tokens))
            self._note()
            time.sleep(1 / REQUESTS_PER_S)

    def check(self) -> None:
        """Every request must be answered."""
        for answer, output_tokens in self._asked:
            assert answer.result(timeout_s=10.0) == output_tokens

    def _note(self) -> None:
        sizes = targets()
        if self.seen[-1:] != [sizes]:
            self.seen.append(sizes)


def test_unequal_delays_are_refused_and_the_pools_then_scale_together(
    logs: Path, tmp_path: Path
) -> None:
    decisions = tmp_path / "decisions.jsonl"
    deploy(decisions, prefill_delay_s=5.0)
    wait_for(lambda: running() == (1, 1), 60.0)

    def refusals() -> list[str]:
        text = "\n".join(file.read_text() for file in logs.glob("controller_*.log"))
        return [line for line in text.splitlines() if "neither pool is scaled" in line]

    wait_for(refusals, 15.0)
    load = Load(serve.get_app_handle("pd"))
    load.run(3.0, MANY_TOKENS)
    assert running() == (1, 1)
    (said,) = refusals()
    assert "upscale_delay_s is 5.0 for Prefill and 0.0 for Decode" in said
    assert not decisions.exists()

    deploy(decisions)
    wait_for(decisions.exists, 30.0)
    load.until((2, 2), MANY_TOKENS, limit_s=120.0)
    load.until((1, 1), FEW_TOKENS, limit_s=90.0)
    load.check()
    assert load.seen == [(1, 1), (2, 2), (1, 1)]
    moves = [r.decision for r in Recording.parse(decisions.read_text()).records]
    moves = [decision for decision in moves if decision.action is not Action.HOLD]
    assert [decision.action for decision in moves] == [Action.OUT, Action.IN]
    assert all("decode_tps" in decision.reason for decision in moves)
    assert len(refusals()) == 1

    serve.delete("pd")
    assert "pd" not in serve.status().applications
