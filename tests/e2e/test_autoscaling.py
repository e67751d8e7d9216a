"""The closed loop on real workers: one signal sizes both pools, and no request notices."""

import threading
from typing import Any

import pytest

from tests.background_load import BackgroundLoad
from tests.served import Served, tandem, wait_until

pytestmark = pytest.mark.alone

OUTPUT_TOKENS = 24
PROMPT_TOKENS = 300
# Requests per second: a plateau that one decode worker carries, one that takes two, and back.
LOW_RATE, HIGH_RATE = 0.5, 2.5
TARGET_TPS = 35.0
LOW_S, HIGH_S = 10.0, 90.0
AUTOSCALER: dict[str, Any] = {
    "autoscaler__mode": "act",
    "autoscaler__signal": "decode_tps",
    "autoscaler__target_per_worker": TARGET_TPS,
    "autoscaler__ratio": "1:1",
    "autoscaler__max_prefill": 2,
    "autoscaler__max_decode": 2,
    # Only what was served counts here: neither arrivals nor latency may trigger a step.
    "autoscaler__arrival_term": False,
    "autoscaler__cooldown_in_s": 300.0,
    "autoscaler__soft_in_s": 60.0,
    "autoscaler__speedup": 12.0,
}


def test_both_pools_follow_decode_tps_up_and_down_without_a_failed_request() -> None:
    with tandem("test-autoscaling", cluster__warmup=True, **AUTOSCALER) as served:
        assert pool_sizes(served) == (1, 1)
        is_falling = threading.Event()

        def rate(elapsed_s: float) -> float:
            return LOW_RATE if elapsed_s < LOW_S or is_falling.is_set() else HIGH_RATE

        with BackgroundLoad(served, rate, PROMPT_TOKENS, OUTPUT_TOKENS) as load:
            wait_until(lambda: pool_sizes(served) == (2, 2), LOW_S + HIGH_S, "2P2D")
            is_falling.set()
            wait_until(lambda: pool_sizes(served) == (1, 1), 120, "1P1D again")
        decisions = served.client.get("/admin/decisions?limit=1000").json()["decisions"]
    assert load.result().failures == []
    assert load.result().num_sent > 30
    steps = [record["decision"] for record in decisions if record["decision"]["action"] != "hold"]
    assert [(step["action"], step["driver"]) for step in steps] == [
        ("out", "signal"),
        ("in", "signal"),
    ], steps
    out, back = (dict(step["inputs"])["decode_tps"] for step in steps)
    assert out > 1.1 * TARGET_TPS and back < 0.85 * 2 * TARGET_TPS


def pool_sizes(served: Served) -> tuple[int, int]:
    """Return how many prefill and decode workers the router may use."""
    roles = [w["role"] for w in served.workers().values() if w["state"] == "ready"]
    return roles.count("prefill"), roles.count("decode")
