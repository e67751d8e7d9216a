"""What holds of every decision, whatever the pools, the load and the clock do."""

import json
import math
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.decision import Action, Decision, Driver, PolicyState
from autoscaler.limits import Limits
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts, Snapshot
from autoscaler.windows import Missing
from cluster.autoscaler_config import AutoscalerSection
from cluster.names import Role
from tests.unit.autoscaler.samples import START, section

GONE = Missing("the last report is 130 s old")
IDLE = Missing("no request in the window", is_idle=True)
HIGHEST = {
    "decode_tps": 5000.0,
    "prefill_tps": 5000.0,
    "prefill_util": 1.0,
    "decode_util": 1.0,
    "ttft_s": 0.3,
    "tbt_s": 0.3,
    "arrivals_per_s": 50.0,
    "prompt_tokens": 2000.0,
    "output_tokens": 2000.0,
}


def any_snapshot(rng: Random, worker_gpus: tuple[float, float]) -> Snapshot:
    """Return one of any load: now and then without a value, often near the last one's."""
    readings: dict[str, Any] = {
        name: rng.choice([GONE, IDLE, *[rng.random() ** 2 * highest] * 10])
        for name, highest in HIGHEST.items()
    }
    prefill, decode = (PoolCounts(*(rng.randint(0, 9) for _ in range(5))) for _ in Role)
    return Snapshot(prefill, decode, **readings, worker_gpus=worker_gpus)


CALENDAR = [
    {"start": "08:30", "end": "09:30", "prefill": 5, "decode": 4, "kind": "floor"},
    {"start": "10:00", "end": "11:00", "prefill": 2, "decode": 4, "kind": "fixed"},
]


@st.composite
def sections(draw: st.DrawFn) -> AutoscalerSection:
    signal = draw(st.sampled_from(["decode_tps", "prefill_tps", "decode_util", "tbt"]))
    changes: dict[str, Any] = {
        "signal": signal,
        "target_per_worker": 0.6 if signal.endswith("_util") else 100.0,
        "ratio": draw(st.sampled_from(["1:1", "9:7", "1:3", "3:1"])),
        "max_prefill": draw(st.integers(6, 30)),
        "max_decode": draw(st.integers(6, 30)),
        "gpu_budget": draw(st.none() | st.integers(14, 60)),
        "arrival_term": draw(st.booleans()),
        "ratio_estimation": draw(st.booleans()),
        "ratio_lengths": 4.0,
        "ratio_change_per_h": 5.0,
        "slo_ttft_s": draw(st.none() | st.just(0.1)),
        "calendar": draw(st.sampled_from([[], CALENDAR])),
    }
    return section(**changes)


Walks = list[tuple[float, Snapshot]]
starts = st.builds(Sizes, st.integers(1, 12), st.integers(1, 12))


@st.composite
def walks(draw: st.DrawFn) -> Walks:
    """Return (seconds since the last, snapshot) of some decisions; drawn whole, to be fast."""
    rng = Random(draw(st.integers(0, 2**32)))
    gpus = (rng.choice([0.0, 1.0]), rng.choice([0.5, 1.0]))
    return [(rng.choice([1, 30, 200, 700]), any_snapshot(rng, gpus)) for _ in range(8)]


def walked(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> list[tuple[PolicyState, Snapshot, Decision, PolicyState]]:
    now, state, steps = START, PolicyState(start), []
    for seconds, sample in walk:
        now += seconds
        decision, after = decide(config, state, sample, now)
        steps.append((state, sample, decision, after))
        state = after
    return steps


@given(sections(), starts, walks())
def test_bounds_and_budget_are_never_broken(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    for _, sample, decision, after in walked(config, start, walk):
        assert Limits.configured(config, sample.worker_gpus).allow(decision.final)
        assert after.target == decision.final


@given(sections(), starts, walks())
def test_nothing_shrinks_within_the_cooldown(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    for before, _, decision, _ in walked(config, start, walk):
        stamps = [at for at in (before.last_out_at, before.last_in_at) if at is not None]
        is_soon = bool(stamps) and decision.now - max(stamps) < config.cooldown_in_s
        if is_soon and decision.driver is not Driver.LIMITS:
            assert decision.final.covers(before.target)


@given(sections(), starts, walks())
def test_a_scale_in_is_small(config: AutoscalerSection, start: Sizes, walk: Walks) -> None:
    for before, _, decision, _ in walked(config, start, walk):
        if decision.driver in (Driver.SIGNAL, Driver.ARRIVALS, Driver.RATIO):
            for pool in ("prefill", "decode"):
                had = getattr(before.target, pool)
                assert had - getattr(decision.final, pool) <= math.ceil(config.scale_in_step * had)


@given(sections(), starts, walks())
def test_the_pools_move_apart_only_to_repair_the_ratio(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    for before, _, decision, _ in walked(config, start, walk):
        prefill = decision.final.prefill - before.target.prefill
        decode = decision.final.decode - before.target.decode
        assert prefill * decode >= 0 or decision.action is Action.REPAIR
        expected = {Action.OUT: 1, Action.RESTORE: 1, Action.IN: -1}.get(decision.action, 0)
        assert expected == 0 or expected * (prefill + decode) > 0
        assert (decision.action is Action.HOLD) == (prefill == decode == 0)


@given(sections(), starts, walks())
def test_a_tick_of_no_length_changes_nothing(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    *_, (_, _, decision, after) = walked(config, start, walk)
    again, unchanged = decide(config, after, walk[0][1], decision.now)
    assert unchanged == after
    assert (again.action, again.final) == (Action.HOLD, decision.final)


@given(sections(), starts, walks())
def test_clamps_lead_from_the_raw_target_to_the_final_sizes(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    for before, _, decision, _ in walked(config, start, walk):
        at = before.target if decision.raw is None else decision.raw
        for clamp in decision.clamps:
            assert clamp.reason and clamp.before == at != clamp.after
            at = clamp.after
        assert at == decision.final


@given(sections(), starts, walks())
@settings(max_examples=30)
def test_documents_round_trip_exactly(config: AutoscalerSection, start: Sizes, walk: Walks) -> None:
    for _, sample, decision, after in walked(config, start, walk):
        for kind, value in ((Snapshot, sample), (Decision, decision), (PolicyState, after)):
            document = json.loads(json.dumps(value.as_document()))
            assert kind.from_document(document) == value


@given(sections(), starts, walks())
@settings(max_examples=30)
def test_without_a_signal_nothing_shrinks(
    config: AutoscalerSection, start: Sizes, walk: Walks
) -> None:
    blind = [
        (
            seconds,
            replace(
                sample, decode_tps=GONE, prefill_tps=GONE, decode_util=GONE, ttft_s=GONE, tbt_s=GONE
            ),
        )
        for seconds, sample in walk
    ]
    for before, _, decision, _ in walked(config, start, blind):
        if decision.driver not in (Driver.LIMITS, Driver.CALENDAR):
            assert decision.final.covers(before.target)
