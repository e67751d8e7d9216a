"""The clock walks: what the policy does over minutes and hours, not at one moment."""

import itertools
import json

from autoscaler.decision import Action, Driver, Pin, PolicyState
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts, Snapshot
from tests.unit.autoscaler.samples import IDLE, STALE, START, Walk, section, snapshot, state


def load(tps: float) -> Snapshot:
    return snapshot(decode_tps=tps)


def test_a_burst_is_followed_in_one_jump_and_given_back_in_small_steps() -> None:
    walk = Walk(section(), state(4, 4))
    walk.steps(load(400), 10)
    walk.steps(load(1000), 20)
    assert walk.moves() == [(330, Action.OUT, Sizes(10, 10))]
    walk.steps(load(400), 200)
    downs = walk.moves()[1:]
    assert [action for _, action, _ in downs] == [Action.IN] * 6
    assert [sizes.decode for _, _, sizes in downs] == [9, 8, 7, 6, 5, 4]
    gaps = [later - earlier for (earlier, *_), (later, *_) in itertools.pairwise(walk.moves())]
    assert min(gaps) >= 600


def test_load_around_a_threshold_does_not_flap() -> None:
    walk = Walk(section(), state(4, 4))
    for tps in itertools.islice(itertools.cycle((430, 345, 400)), 120):
        walk.step(load(tps))
    assert walk.moves() == []


def test_decay_to_nothing_ends_at_the_smallest_pools() -> None:
    walk = Walk(section(min_prefill=2, min_decode=2), state(6, 6))
    walk.steps(snapshot(tbt_s=IDLE), 120)
    assert walk.sizes == Sizes(2, 2)
    assert walk.decisions[-1].action is Action.HOLD
    assert walk.decisions[-1].clamps[-1].name == "limits"


def test_a_role_that_starts_slower_does_not_make_the_policy_ask_again() -> None:
    walk = Walk(section(), state(2, 2))
    walk.step(load(600))
    assert walk.sizes == Sizes(6, 6)
    half_up = snapshot(
        decode_tps=600.0,
        prefill=PoolCounts(serving=3, held=3),
        decode=PoolCounts(serving=3, starting=3),
    )
    walk.steps(half_up, 30)
    assert walk.sizes == Sizes(6, 6)
    assert all(decision.action is Action.HOLD for decision in walk.decisions[1:])


def test_missing_metrics_hold_everything_but_the_floor() -> None:
    floor = {"start": "08:10", "end": "20:00", "prefill": 6, "decode": 6}
    walk = Walk(section(calendar=[floor]), state(4, 4))
    walk.steps(snapshot(decode_tps=STALE, tbt_s=STALE), 40)
    assert walk.moves() == [(600, Action.OUT, Sizes(6, 6))]
    walk.steps(load(0), 60)
    assert walk.sizes == Sizes(6, 6)


def test_metrics_that_come_back_are_followed() -> None:
    walk = Walk(section(), state(4, 4))
    walk.steps(snapshot(decode_tps=STALE, tbt_s=STALE), 10)
    assert walk.step(load(700)).final == Sizes(7, 7)


def test_a_scale_in_that_hurts_is_taken_back_and_not_tried_again_soon() -> None:
    walk = Walk(section(), state(6, 6))
    assert walk.step(load(400)).action is Action.IN
    hurt = walk.step(snapshot(decode_tps=400.0, tbt_s=0.11))
    assert (hurt.action, hurt.final, hurt.driver) == (
        Action.RESTORE,
        Sizes(6, 6),
        Driver.OBSERVATION,
    )
    walk.steps(load(400), 39)
    assert walk.sizes == Sizes(6, 6)
    assert walk.decisions[-1].clamps[-1].name in ("backoff", "recent latency", "scale-in cooldown")
    walk.steps(load(400), 2)
    assert walk.sizes == Sizes(5, 5)


def test_after_its_observation_a_scale_in_stands() -> None:
    walk = Walk(section(), state(6, 6))
    walk.step(load(400))
    walk.step(load(400), seconds=301)
    later = walk.step(snapshot(decode_tps=400.0, tbt_s=0.11))
    assert later.action is not Action.RESTORE and walk.state.size_before_in is None


def test_a_restart_goes_on_from_the_document() -> None:
    config = section()
    straight, broken = Walk(config, state(4, 4)), Walk(config, state(4, 4))
    samples = [load(tps) for tps in (400, 900, 900, 300, 300, 1500, 200, 200, 200, 900)]
    for index, sample in enumerate(samples * 8):
        straight.step(sample, seconds=90)
        broken.step(sample, seconds=90)
        if index % 7 == 3:
            document = json.dumps(broken.state.as_document())
            broken.state = PolicyState.from_document(json.loads(document))
    assert broken.decisions == straight.decisions
    assert len(straight.moves()) > 3


def test_a_budget_cut_for_a_service_of_higher_priority_is_obeyed_at_once() -> None:
    def busy() -> Snapshot:
        return snapshot(decode_tps=800.0, worker_gpus=(1.0, 1.0))

    walk = Walk(section(gpu_budget=16.0), state(4, 4))
    walk.step(busy())
    assert walk.sizes == Sizes(8, 8)
    walk.config = section(gpu_budget=10.0)
    cut = walk.step(busy())
    assert (cut.final, cut.driver) == (Sizes(5, 5), Driver.LIMITS)
    walk.steps(busy(), 20)
    assert walk.sizes == Sizes(5, 5)
    walk.config = section(gpu_budget=16.0)
    assert walk.step(busy()).final == Sizes(8, 8)


def test_sizes_ordered_by_hand_stay_until_the_order_is_taken_back() -> None:
    walk = Walk(section(), state(4, 4, pin=Pin(Sizes(2, 3), "tandem scale")))
    walk.steps(load(2000), 5)
    assert walk.moves() == [(30, Action.REPAIR, Sizes(2, 3))] or walk.sizes == Sizes(2, 3)
    walk.state = state(2, 3)
    assert walk.step(load(2000)).final == Sizes(20, 20)


def test_a_fixed_window_is_entered_and_left() -> None:
    fixed = {"start": "09:00", "end": "10:00", "prefill": 8, "decode": 4, "kind": "fixed"}
    walk = Walk(section(calendar=[fixed]), state(4, 4))
    walk.steps(load(400), 300)
    assert walk.moves()[0] == (3600, Action.OUT, Sizes(8, 4))
    repairs = walk.moves()[1:]
    assert [sizes.prefill for _, _, sizes in repairs] == [7, 6, 5, 4]
    assert all(action is Action.REPAIR and at >= 7200 for at, action, _ in repairs)


def test_an_hour_of_drifting_lengths_moves_the_ratio_but_not_far() -> None:
    config = section(ratio_estimation=True, ratio_lengths=4.0, ratio_drift=0.5)
    walk = Walk(config, state(10, 10))
    walk.steps(snapshot(decode_tps=1000.0, prompt_tokens=9000.0, output_tokens=100.0), 1000)
    # 15 would be exact; 14 is within the tolerance.
    assert walk.sizes == Sizes(14, 10)
    assert walk.state.estimated_ratio == 1.5


def test_a_clock_that_is_set_back_costs_one_cooldown_and_says_so() -> None:
    """Not the hour until it has caught up."""
    walk = Walk(section(), state(4, 4))
    walk.step(load(800))
    assert walk.sizes == Sizes(8, 8)
    held = walk.step(load(2000), seconds=-3600)
    assert held.action is Action.HOLD and walk.state.decided_at == held.now
    assert held.reason.endswith(
        "scale-out cooldown: last scale-out 0 s ago, 180 s between two;"
        " the clock was set back 3600 s: cooldowns begin anew"
    )
    walk.steps(load(2000), 5)
    assert walk.sizes == Sizes(8, 8) and "set back" not in walk.decisions[-1].reason
    walk.step(load(2000))
    assert walk.sizes == Sizes(20, 20)


def test_a_clock_that_is_set_back_prolongs_no_backoff() -> None:
    config = section()
    late = state(8, 8, decided_at=START + 9e6, backoff_until=START + 9e6, last_in_at=START + 9e6)
    walk = Walk(config, late)
    walk.step(load(100))
    assert walk.state.backoff_until == walk.now + config.backoff_s
    assert walk.state.last_in_at == walk.now
