"""One decision at a time: what drives it, every clamp with its reason, and the precedence."""

from typing import Any

import pytest

from autoscaler.decision import Action, Decision, Driver, Pin, PolicyState
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts, Snapshot
from tests.unit.autoscaler.samples import IDLE, STALE, START, section, snapshot, state

LATE = state(4, 4, last_out_at=START - 10_000, last_in_at=START - 10_000)


def decision_of(
    before: PolicyState = LATE, sample: Snapshot | None = None, **changes: Any
) -> Decision:
    return decide(section(**changes), before, sample or snapshot(), START)[0]


def laws(decision: Decision) -> list[str]:
    return [clamp.name for clamp in decision.clamps]


@pytest.mark.parametrize(
    ("tps", "raw", "final", "action", "at_work"),
    [
        (400.0, (4, 4), (4, 4), Action.HOLD, []),
        (439.0, (5, 5), (4, 4), Action.HOLD, ["hysteresis"]),
        (441.0, (5, 5), (5, 5), Action.OUT, []),
        (2000.0, (20, 20), (20, 20), Action.OUT, []),
        (9000.0, (90, 90), (40, 40), Action.OUT, ["limits"]),
        (341.0, (4, 4), (4, 4), Action.HOLD, []),
        (290.0, (3, 3), (3, 3), Action.IN, []),
        (100.0, (1, 1), (3, 3), Action.IN, ["dampening"]),
        (0.0, (0, 0), (3, 3), Action.IN, ["dampening"]),
    ],
)
def test_decode_tokens_size_both_pools(
    tps: float, raw: tuple[int, int], final: tuple[int, int], action: Action, at_work: list[str]
) -> None:
    decision = decision_of(sample=snapshot(decode_tps=tps))
    assert (decision.raw, decision.final) == (Sizes(*raw), Sizes(*final))
    assert (decision.action, decision.driver) == (action, Driver.SIGNAL)
    assert laws(decision) == at_work


@pytest.mark.parametrize(
    ("changes", "sample", "final"),
    [
        ({"signal": "prefill_tps"}, {"prefill_tps": 700.0}, (7, 7)),
        ({"signal": "prefill_tps", "ratio": "2:1"}, {"prefill_tps": 700.0}, (8, 4)),
        ({"signal": "decode_tps", "ratio": "2:1"}, {"decode_tps": 700.0}, (14, 7)),
        ({"signal": "decode_util", "target_per_worker": 0.5}, {"decode_util": 0.9}, (8, 8)),
        ({"signal": "prefill_util", "target_per_worker": 0.5}, {"prefill_util": 0.9}, (8, 8)),
    ],
)
def test_any_studied_signal_sizes_both_pools(
    changes: dict[str, Any], sample: dict[str, float], final: tuple[int, int]
) -> None:
    decision = decision_of(sample=snapshot(**sample), **changes)
    assert (decision.final, decision.action) == (Sizes(*final), Action.OUT)
    assert decision.inputs[0].name == changes["signal"]


def test_utilisation_counts_only_workers_that_serve() -> None:
    half_up = snapshot(decode=PoolCounts(serving=2, starting=2), decode_util=1.0)
    held = decision_of(sample=half_up, signal="decode_util", target_per_worker=0.5)
    assert held.action is Action.HOLD and held.raw == Sizes(4, 4)


@pytest.mark.parametrize(
    ("signal", "latency", "final"),
    [
        ("tbt", 0.02, (3, 3)),
        ("tbt", 0.07, (4, 4)),
        ("tbt", 0.11, (5, 5)),
        ("ttft", 0.02, (3, 3)),
        ("ttft", 0.13, (5, 5)),
    ],
)
def test_a_latency_signal_shrinks_when_far_below_and_grows_by_tiers(
    signal: str, latency: float, final: tuple[int, int]
) -> None:
    sample = snapshot(**{"tbt_s": IDLE, f"{signal}_s": latency})
    changes: dict[str, Any] = {"slo_tbt_s": None, "target_per_worker": None}
    changes |= {"signal": signal, f"slo_{signal}_s": 0.1}
    decision = decision_of(sample=sample, **changes)
    assert decision.final == Sizes(*final)


@pytest.mark.parametrize(
    ("latency", "sizes", "final"),
    [(0.099, 20, 20), (0.1, 20, 22), (0.119, 20, 22), (0.12, 20, 24), (5.0, 20, 24), (0.1, 1, 2)],
)
def test_latency_tiers_grow_both_pools_by_fixed_steps(
    latency: float, sizes: int, final: int
) -> None:
    sample = snapshot(decode_tps=100.0 * sizes, tbt_s=latency)
    decision = decision_of(state(sizes, sizes), sample)
    assert decision.final == Sizes(final, final)
    if final > sizes:
        assert (decision.action, decision.driver) == (Action.OUT, Driver.LATENCY)
        assert laws(decision) == ["latency tier"]


def test_a_tier_adds_nothing_to_a_larger_need() -> None:
    decision = decision_of(sample=snapshot(decode_tps=900.0, tbt_s=0.2))
    assert (decision.final, decision.driver) == (Sizes(9, 9), Driver.SIGNAL)


def test_the_worst_watched_latency_counts() -> None:
    decision = decision_of(sample=snapshot(decode_tps=400.0, ttft_s=2.6), slo_ttft_s=2.0)
    assert decision.driver is Driver.LATENCY and "1.3 of its objective" in decision.reason


def test_arrivals_show_a_burst_that_no_worker_can_serve_yet() -> None:
    burst = snapshot(decode_tps=400.0, arrivals_per_s=10.0, output_tokens=100.0)
    assert decision_of(sample=burst).action is Action.HOLD
    decision = decision_of(sample=burst, arrival_term=True)
    # 100 arrivals in 10 s, less two standard deviations: 8 requests/s of 100 tokens.
    assert (decision.final, decision.driver) == (Sizes(8, 8), Driver.ARRIVALS)


def test_a_few_arrivals_may_be_chance() -> None:
    few = snapshot(decode_tps=400.0, arrivals_per_s=0.5, output_tokens=1000.0)
    assert decision_of(sample=few, arrival_term=True).driver is Driver.SIGNAL


GUARDED = [
    ("missing signal", LATE, {"decode_tps": STALE, "arrivals_per_s": 0.1, "output_tokens": 1.0}),
    ("missing latency", LATE, {"tbt_s": STALE}),
    ("latency guard", LATE, {"tbt_s": 0.095}),
    ("recent latency", state(4, 4, breached_at=START - 599), {}),
    ("backoff", state(4, 4, backoff_until=START + 1), {}),
    ("scale-in cooldown", state(4, 4, last_out_at=START - 599), {}),
    ("scale-in cooldown", state(4, 4, last_in_at=START - 599), {}),
]


@pytest.mark.parametrize(("law", "before", "sample"), GUARDED)
def test_nothing_is_taken_back_while_that_could_hurt(
    law: str, before: PolicyState, sample: dict[str, Any]
) -> None:
    decision = decision_of(before, snapshot(**sample), arrival_term=True)
    assert (decision.action, decision.final) == (Action.HOLD, Sizes(4, 4))
    assert laws(decision)[-1] == law and decision.clamps[-1].reason


def test_an_idle_service_shrinks_although_no_latency_is_known() -> None:
    assert decision_of(sample=snapshot(tbt_s=IDLE)).action is Action.IN


def test_a_missing_signal_holds_but_the_safety_layer_does_not() -> None:
    held = decision_of(sample=snapshot(decode_tps=STALE))
    assert (held.action, held.raw, held.driver) == (Action.HOLD, None, Driver.NOTHING)
    assert "130 s old" in held.reason
    grown = decision_of(sample=snapshot(decode_tps=STALE, tbt_s=0.2))
    assert (grown.action, grown.driver) == (Action.OUT, Driver.LATENCY)


def test_a_scale_out_waits_for_the_last_to_take_effect() -> None:
    busy = snapshot(decode_tps=900.0)
    waiting = decision_of(state(4, 4, last_out_at=START - 179), busy)
    assert waiting.action is Action.HOLD and laws(waiting) == ["scale-out cooldown"]
    assert decision_of(state(4, 4, last_out_at=START - 180), busy).action is Action.OUT
    assert decision_of(state(4, 4, last_in_at=START - 1), busy).action is Action.OUT


def test_severe_latency_passes_the_cooldown_once_in_a_while() -> None:
    severe = snapshot(decode_tps=400.0, tbt_s=0.13)
    before = state(4, 4, last_out_at=START - 10)
    decision, after = decide(section(), before, severe, START)
    assert decision.action is Action.OUT and after.bypassed_at == START
    severe = snapshot(decode_tps=500.0, tbt_s=0.13)
    again = decide(section(), after, severe, START + 30)[0]
    assert laws(again) == ["latency tier", "scale-out cooldown"]
    moderate = snapshot(decode_tps=400.0, tbt_s=0.11)
    assert decision_of(before, moderate).action is Action.HOLD


def test_speed_divides_the_cooldowns() -> None:
    busy = snapshot(decode_tps=900.0)
    before = state(4, 4, last_out_at=START - 2)
    assert decision_of(before, busy, speedup=60).action is Action.HOLD
    assert decision_of(before, busy, speedup=120).action is Action.OUT


WINDOW = {"days": ["fri"], "start": "07:00", "end": "09:00", "prefill": 6, "decode": 3}


def test_a_floor_keeps_both_pools_up_in_the_ratio() -> None:
    decision = decision_of(calendar=[WINDOW])
    assert (decision.final, decision.action) == (Sizes(6, 6), Action.OUT)
    assert decision.driver is Driver.CALENDAR and laws(decision)[-1] == "calendar floor"
    assert "fri 07:00-09:00" in decision.reason
    over = decision_of(state(8, 8), calendar=[WINDOW])
    assert (over.final, over.action) == (Sizes(7, 7), Action.IN)


def test_a_fixed_window_is_the_target_whatever_the_load() -> None:
    fixed = [{**WINDOW, "kind": "fixed"}]
    decision = decision_of(sample=snapshot(decode_tps=4000.0, tbt_s=1.0), calendar=fixed)
    assert (decision.final, decision.action) == (Sizes(6, 3), Action.REPAIR)
    waiting = decision_of(state(4, 4, last_in_at=START - 10), calendar=fixed)
    assert waiting.action is Action.HOLD and laws(waiting) == ["scale-in cooldown"]


def test_the_calendar_keeps_local_time() -> None:
    # START is Friday 08:00 UTC, 09:00 in Berlin, where the window has just ended.
    assert decision_of(calendar=[WINDOW], calendar_timezone="Europe/Berlin").action is Action.IN


def test_pinned_sizes_move_at_once_and_stay() -> None:
    before = state(4, 4, pin=Pin(Sizes(2, 6), "by hand"), last_out_at=START, last_in_at=START)
    decision = decision_of(before, snapshot(decode_tps=3000.0))
    assert (decision.final, decision.action) == (Sizes(2, 6), Action.REPAIR)
    assert decision.driver is Driver.PIN and "by hand" in decision.reason
    over = decision_of(state(4, 4, pin=Pin(Sizes(2, 60), "by hand")))
    assert over.final == Sizes(2, 40) and laws(over) == ["limits"]


def test_a_pin_is_followed_at_once_from_sizes_outside_the_limits() -> None:
    decision = decision_of(state(50, 50, pin=Pin(Sizes(2, 1), "by hand")))
    assert (decision.final, decision.driver) == (Sizes(2, 1), Driver.PIN)


def test_the_ratio_is_repaired_step_by_step_when_nothing_else_moves() -> None:
    calm = snapshot(decode_tps=400.0)
    grown = decision_of(state(2, 4), calm)
    assert (grown.final, grown.action, grown.driver) == (Sizes(3, 4), Action.REPAIR, Driver.RATIO)
    assert decision_of(state(7, 4), calm).final == Sizes(6, 4)
    assert decision_of(state(7, 4, last_in_at=START - 1), calm).action is Action.HOLD
    assert decision_of(state(2, 4, last_out_at=START - 1), calm).action is Action.HOLD
    follows = snapshot(prefill_tps=400.0)
    assert decision_of(state(4, 7), follows, signal="prefill_tps").final == Sizes(4, 6)
    near = snapshot(decode_tps=2000.0)
    assert decision_of(state(21, 20), near).action is Action.HOLD


def test_scale_out_completes_the_ratio_and_never_shrinks_the_other_pool() -> None:
    decision = decision_of(state(7, 4), snapshot(decode_tps=550.0))
    assert (decision.raw, decision.final) == (Sizes(6, 6), Sizes(7, 6))
    assert laws(decision) == ["one direction"]


def test_the_ratio_follows_observed_lengths() -> None:
    config = section(ratio_estimation=True, ratio_lengths=4.0, ratio_change_per_h=1.0)
    long = snapshot(decode_tps=400.0, prompt_tokens=800.0, output_tokens=100.0)
    first, after = decide(config, LATE, long, START)
    assert first.action is Action.HOLD and after.estimated_ratio == 1.0
    second, after = decide(config, after, long, START + 3600)
    assert after.estimated_ratio == pytest.approx(1.5)
    assert (second.action, second.final) == (Action.REPAIR, Sizes(5, 4))


def test_limits_narrowed_around_the_pools_count_at_once() -> None:
    before = state(4, 4, last_out_at=START, last_in_at=START)
    gpus = snapshot(decode_tps=400.0, worker_gpus=(1.0, 1.0))
    decision = decision_of(before, gpus, gpu_budget=6.0)
    assert (decision.final, decision.action) == (Sizes(3, 3), Action.IN)
    assert decision.driver is Driver.LIMITS and "8 GPUs exceed gpu_budget 6" in decision.reason
    assert decision_of(state(1, 1), min_decode=3).final == Sizes(1, 3)


def test_a_decision_explains_itself() -> None:
    decision = decision_of(sample=snapshot(decode_tps=100.0))
    assert decision.reason == (
        "4P4D to 3P3D: decode_tps 100 at 100 per worker needs 1.00 decode workers;"
        " dampening: one scale-in gives back 5% of a pool, rounded up"
    )
    assert [each.name for each in decision.inputs] == [
        "decode_tps",
        "latency_over_objective",
        "arriving_tps",
        "ratio",
    ]
