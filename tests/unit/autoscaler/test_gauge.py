"""The signal beside what it is held against, in the unit of each kind of signal."""

import pytest

from autoscaler.gauge import read_gauge
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts
from autoscaler.windows import Missing
from tests.unit.autoscaler.samples import IDLE, STALE, section, snapshot

POOLS = {"prefill": PoolCounts(serving=2), "decode": PoolCounts(serving=3, starting=1)}
WANTED = Sizes(2, 4)


@pytest.mark.parametrize(
    ("signal", "unit", "role", "value", "capacity", "target"),
    [
        ("decode_tps", "tokens/s", "decode", 250.0, 300.0, 400.0),
        ("prefill_tps", "tokens/s", "prefill", 90.0, 200.0, 200.0),
    ],
)
def test_tokens_are_held_against_what_serves_and_what_is_wanted(
    signal: str, unit: str, role: str, value: float, capacity: float, target: float
) -> None:
    seen = snapshot(**POOLS, **{signal: value})
    document = read_gauge(section(signal=signal), seen, WANTED).as_document()
    assert document == {
        "name": signal,
        "unit": unit,
        "role": role,
        "value": value,
        "missing": None,
        "is_idle": False,
        "per_worker": 100.0,
        "capacity": capacity,
        "target": target,
    }


def test_a_share_is_held_against_the_share_wanted_and_the_whole() -> None:
    config = section(signal="prefill_util", target_per_worker=0.6)
    gauge = read_gauge(config, snapshot(**POOLS, prefill_util=0.5), WANTED)
    assert (gauge.unit, gauge.value, gauge.capacity, gauge.target) == ("share", 0.5, 1.0, 0.6)


@pytest.mark.parametrize(("signal", "target"), [("ttft", 2.0), ("tbt", 0.1)])
def test_a_latency_is_held_against_its_objective(signal: str, target: float) -> None:
    gauge = read_gauge(section(signal=signal, slo_ttft_s=2.0), snapshot(**POOLS), WANTED)
    assert (gauge.unit, gauge.capacity, gauge.target, gauge.per_worker) == ("s", None, target, None)


@pytest.mark.parametrize("missing", [IDLE, STALE])
def test_what_is_missing_says_why(missing: Missing) -> None:
    document = read_gauge(section(), snapshot(**POOLS, decode_tps=missing), WANTED).as_document()
    assert document["value"] is None and document["missing"] == missing.reason
    assert document["is_idle"] is missing.is_idle


def test_without_a_target_only_the_value_is_known() -> None:
    config = section(mode="off", target_per_worker=None)
    gauge = read_gauge(config, snapshot(**POOLS, decode_tps=5.0), WANTED)
    assert (gauge.value, gauge.capacity, gauge.target) == (5.0, None, None)
