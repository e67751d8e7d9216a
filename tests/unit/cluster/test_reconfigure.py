"""Which changes of the configuration a running deployment takes on, and which it refuses."""

from typing import Any

import pytest

from cluster.config import TandemConfig, merge, parse_config
from cluster.names import Role
from cluster.reconfigure import LIVE, InForce, differences, judge, refusal

RUNNING: dict[str, Any] = {"model": {"max_model_len": 512}, "prefill": {"workers": 2}}
ONE_EACH = dict.fromkeys(Role, 1)


def changed(**changes: Any) -> TandemConfig:
    return parse_config(merge(RUNNING, changes))


def test_the_same_configuration_has_no_differences() -> None:
    assert differences(changed(), changed()) == ()
    # A default that is spelled out is the same setting.
    assert differences(changed(), changed(cluster={"standby": 0})) == ()


def test_differences_name_the_path_and_both_values() -> None:
    found = differences(changed(), changed(prefill={"workers": 3}, model={"chunk_tokens": 64}))
    assert [str(each) for each in found] == [
        "model.chunk_tokens 2048 -> 64",
        "prefill.workers 2 -> 3",
    ]


LIVE_CHANGES: list[dict[str, Any]] = [
    {"prefill": {"workers": 3}, "decode": {"workers": 4}},
    {"autoscaler": {"mode": "act", "target_per_worker": 10.0, "ratio": "2:1"}},
    {"autoscaler": {"calendar": [{"start": "08:00", "end": "09:00", "prefill": 1, "decode": 1}]}},
    {"router": {"max_queued": 2, "replicas": 2}},
    {"cluster": {"standby": 1, "drain_s": 1.0, "warmup": False, "start_timeout_s": 5.0}},
    {"placement": {"priority": 3, "min_units": 0}},
]
FIXED_CHANGES: list[dict[str, Any]] = [
    {"model": {"path": "/models/other"}},
    {"model": {"engine_args": {"enforce_eager": True}}},
    {"prefill": {"tensor_parallel_size": 2}},
    {"decode": {"gpus_per_worker": 1, "gpu_types": "A"}},
    {"decode": {"engine_args": {"a": 1}}},
    {"handoff": {"chunk_bytes": 1024}},
    {"simulated": {"num_blocks": 8}},
    {"placement": {"affinity": "s1"}},
    {"cluster": {"orphan_s": 1.0}},
]


@pytest.mark.parametrize("changes", LIVE_CHANGES)
def test_what_controller_and_routers_read_changes_live(changes: dict[str, Any]) -> None:
    found = differences(changed(), changed(**changes))
    assert found and refusal(found) is None


@pytest.mark.parametrize("changes", FIXED_CHANGES)
def test_what_workers_are_built_from_is_refused(changes: dict[str, Any]) -> None:
    # One live change beside it does not save the rest, and does not stand among the reasons.
    wanted = changed(**merge({"router": {"max_queued": 1}}, changes))
    why = refusal(differences(changed(), wanted))
    (section,) = changes
    assert why is not None and why.startswith(f"{section}.")
    assert "delete the app and deploy it again" in why and "max_queued" not in why


def test_every_live_path_exists() -> None:
    document = changed().model_dump()
    for path in LIVE:
        section, _, key = path.partition(".")
        assert section in document and (not key or key in document[section]), path


def test_a_later_configuration_sets_the_sizes_it_changes() -> None:
    running = InForce(changed(), 1.0)
    offered = InForce(changed(decode={"workers": 4}), 2.0)
    verdict = judge(running, offered, ONE_EACH)
    assert verdict is not None and verdict.in_force == offered and verdict.refused is None
    assert verdict.sizes == {Role.PREFILL: 2, Role.DECODE: 4}
    assert verdict.note == "deployed: decode.workers 1 -> 4"


def test_other_changes_leave_the_sizes_as_they_are() -> None:
    offered = InForce(changed(router={"max_queued": 4}), 2.0)
    verdict = judge(InForce(changed(), 1.0), offered, ONE_EACH)
    assert verdict is not None and verdict.sizes == ONE_EACH
    # Nor do workers where the load sizes the pools.
    act = {"mode": "act", "target_per_worker": 1.0}
    offered = InForce(changed(autoscaler=act, prefill={"workers": 5}), 2.0)
    verdict = judge(InForce(changed(), 1.0), offered, ONE_EACH)
    assert verdict is not None and verdict.sizes == ONE_EACH


def test_a_refused_one_keeps_what_runs_and_is_refused_once() -> None:
    running, offered = InForce(changed(), 1.0), InForce(changed(model={"dtype": "half"}), 2.0)
    verdict = judge(running, offered, ONE_EACH)
    assert verdict is not None and verdict.sizes is None
    assert verdict.refused is not None and "model.dtype auto -> half" in verdict.refused
    assert verdict.in_force == InForce(running.config, 2.0)
    assert judge(verdict.in_force, offered, ONE_EACH) is None


@pytest.mark.parametrize("revision", [0.0, 1.0, 2.0])
def test_an_earlier_one_changes_nothing(revision: float) -> None:
    """A router of the app before, still draining, must not take the pools back."""
    offered = InForce(changed(decode={"workers": 9}), revision)
    assert judge(InForce(changed(), 2.0), offered, ONE_EACH) is None


def test_what_is_in_force_survives_being_written_down() -> None:
    in_force = InForce(changed(autoscaler={"ratio": "2:1"}), 3.5)
    assert InForce.from_document(in_force.as_document()) == in_force
    assert InForce.from_document(None) is None
    assert InForce.from_document({"revision": 1.0, "config": {"model": {"gone": 1}}}) is None
