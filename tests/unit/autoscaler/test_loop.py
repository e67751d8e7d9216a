"""The loop with pools of paper: when it decides, what it applies, what survives a restart."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from autoscaler.decision import Action, Driver
from autoscaler.loop import Autoscaler
from autoscaler.ratio import Sizes
from cluster.config import TandemConfig, parse_config
from cluster.load import ClusterLoad, WorkerLoad
from cluster.names import Role, WorkerId
from cluster.worker_state import WorkerState
from tests.unit.autoscaler.samples import START

BOTH = dict.fromkeys(Role, 2)


def config_of(**autoscaler: Any) -> TandemConfig:
    plain = {"mode": "act", "target_per_worker": 100.0, "arrival_term": False}
    workers = {"workers": 2}
    document = {"prefill": workers, "decode": workers, "autoscaler": {**plain, **autoscaler}}
    return parse_config(document)


@dataclass
class PaperPools:
    """Pools that have what they were asked for at once; `tps` is what decode makes."""

    tps: int = 0
    time: float = START
    tokens: int = 0
    sizes: dict[Role, int] = field(default_factory=lambda: dict(BOTH))
    orders: list[tuple[dict[Role, int], str]] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def load(self) -> ClusterLoad:
        workers = [
            WorkerLoad(
                WorkerId(f"{role}-{index}"),
                role,
                WorkerState.READY,
                1,
                at=self.time,
                generated_tokens=self.tokens if (role, index) == (Role.DECODE, 0) else 0,
            )
            for role in Role
            for index in range(self.sizes[role])
        ]
        return ClusterLoad(self.time, tuple(workers))

    def resize(self, sizes: Mapping[Role, int], reason: str) -> None:
        self.sizes = dict(sizes)
        self.orders.append((self.sizes, reason))

    def pass_time(self, autoscaler: Autoscaler, seconds: int) -> None:
        for _ in range(seconds):
            self.time += 1
            self.tokens += self.tps
            autoscaler.tick()


def test_it_follows_the_load_once_per_period() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(), pools)
    pools.pass_time(autoscaler, 61)
    assert pools.sizes == {Role.PREFILL: 5, Role.DECODE: 5}
    assert len(autoscaler.log.page()) == 3
    assert "decode_tps 500" in pools.orders[-1][1]
    assert autoscaler.snapshot().decode_tps == pytest.approx(500)


def test_a_clock_that_is_set_back_holds_no_decision_up() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(), pools)
    pools.pass_time(autoscaler, 65)
    count = autoscaler.log.next_seq
    pools.time -= 7200
    pools.pass_time(autoscaler, 61)
    assert autoscaler.log.next_seq - count == 3


def test_sizes_that_stay_are_applied_once() -> None:
    pools = PaperPools(tps=200)
    pools.pass_time(Autoscaler(config_of(), pools), 300)
    assert [sizes for sizes, _ in pools.orders] == [BOTH]


def test_advice_is_logged_and_not_followed() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(mode="advise"), pools)
    pools.pass_time(autoscaler, 61)
    assert pools.orders == [] and autoscaler.state.target == Sizes(5, 5)
    assert Action.OUT in [record.decision.action for record in autoscaler.log.page()]


@pytest.mark.parametrize("mode", ["off", "advise", "act"])
def test_an_order_by_hand_goes_through_in_every_mode(mode: str) -> None:
    pools = PaperPools()
    autoscaler = Autoscaler(config_of(mode=mode), pools)
    pools.pass_time(autoscaler, 3)
    autoscaler.pin({Role.PREFILL: 2, Role.DECODE: 3}, "tandem scale")
    pools.pass_time(autoscaler, 1)
    assert pools.sizes == {Role.PREFILL: 2, Role.DECODE: 3}
    assert autoscaler.log.last(1)[0].decision.driver is Driver.PIN
    successor = Autoscaler(config_of(mode=mode), pools, json.loads(saved_by(autoscaler)))
    pools.sizes = dict(BOTH)
    pools.pass_time(successor, 1)
    assert pools.sizes == {Role.PREFILL: 2, Role.DECODE: 3}


def test_an_order_at_the_moment_of_a_decision_is_not_lost() -> None:
    pools = PaperPools()
    autoscaler = Autoscaler(config_of(), pools)
    autoscaler.tick()
    autoscaler.pin({Role.PREFILL: 1, Role.DECODE: 1}, "tandem scale")
    autoscaler.tick()
    assert pools.sizes == {Role.PREFILL: 1, Role.DECODE: 1}


def test_switched_off_it_decides_nothing() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(mode="off"), pools)
    pools.pass_time(autoscaler, 120)
    assert pools.orders == [] and autoscaler.log.page() == []


def test_an_order_and_what_the_file_lacks_are_shown() -> None:
    pools = PaperPools()
    autoscaler = Autoscaler(config_of(decision_file="/nowhere/decisions.jsonl"), pools)
    autoscaler.pin({Role.PREFILL: 3, Role.DECODE: 1}, "by hand")
    assert (autoscaler.pinned, autoscaler.num_unwritten) == ([3, 1], 0)
    autoscaler.tick()
    autoscaler.unpin()
    assert (autoscaler.pinned, autoscaler.num_unwritten) == (None, 1)


def test_after_an_order_is_taken_back_the_load_decides() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(cooldown_out_s=10), pools)
    autoscaler.pin({Role.PREFILL: 3, Role.DECODE: 3}, "tandem scale")
    pools.pass_time(autoscaler, 100)
    assert autoscaler.state.target == Sizes(3, 3)
    autoscaler.unpin()
    pools.pass_time(autoscaler, 100)
    assert autoscaler.state.target == Sizes(5, 5)


def saved_by(autoscaler: Autoscaler) -> str:
    return json.dumps(autoscaler.document())


def test_cooldowns_and_history_survive_a_restart() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(), pools)
    pools.pass_time(autoscaler, 61)
    successor = Autoscaler(config_of(), pools, json.loads(saved_by(autoscaler)))
    assert successor.state == autoscaler.state
    assert successor.log.page() == autoscaler.log.page()
    pools.tps = 0
    pools.pass_time(successor, 500)
    assert successor.state.target == Sizes(5, 5)
    held = successor.log.last(1)[0]
    assert held.decision.clamps[-1].name == "scale-in cooldown"
    assert [record.seq for record in successor.log.page()] == list(range(1, held.seq + 1))


def test_a_successor_is_told_of_changes_and_shown_the_decisions() -> None:
    pools = PaperPools(tps=500)
    autoscaler = Autoscaler(config_of(), pools)
    before = autoscaler.revision
    pools.pass_time(autoscaler, 1)
    assert autoscaler.revision != before
    (shown,) = autoscaler.decisions(after=0, limit=10)
    assert shown == autoscaler.document()["records"][0] and shown["seq"] == 1
    assert autoscaler.decisions(after=1, limit=10) == []


# Decode tokens/s of a dialogue service over a day, by the hour, as a share of the peak.
DAY = (28, 65, 86, 94, 63, 58, 76, 94, 99, 93, 71, 58, 59, 63, 64, 56, 42, 29, 20, 13, 9, 8, 9, 15)


def test_a_day_in_twelve_minutes_is_followed_closely() -> None:
    pools = PaperPools()
    autoscaler = Autoscaler(config_of(speedup=120, max_prefill=12, max_decode=12), pools)
    for second in range(720):
        hour, part = divmod(second, 30)
        pools.tps = 11 * (DAY[hour] * (30 - part) + DAY[(hour + 1) % 24] * part) // 30
        pools.pass_time(autoscaler, 1)
    decisions = [record.decision for record in autoscaler.log.page(limit=1000)][2:]
    off = [
        each.final.decode - max(1, -(-each.inputs[0].value // 100))
        for each in decisions
        if isinstance(each.inputs[0].value, float)
    ]
    assert len(off) == len(decisions) and sum(abs(each) <= 1 for each in off) >= 0.9 * len(off)
    assert all(each.final.prefill == each.final.decode for each in decisions)
    assert {each.driver for each in decisions} == {Driver.SIGNAL}
    assert len(pools.orders) < 60


def test_a_document_of_another_version_is_not_taken_over() -> None:
    autoscaler = Autoscaler(config_of(), PaperPools(), {"version": 0, "state": "?"})
    assert autoscaler.state.target == Sizes(2, 2)


async def test_it_runs_until_cancelled() -> None:
    pools = PaperPools(tps=500)
    task = asyncio.create_task(Autoscaler(config_of(speedup=1000), pools).run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [sizes for sizes, _ in pools.orders] == [BOTH]


def test_a_new_configuration_keeps_what_was_decided_and_sets_the_sizes() -> None:
    pools = PaperPools()
    scaler = Autoscaler(config_of(mode="off"), pools)
    scaler.tick()
    scaler.reconfigure(config_of(decision_period_s=5.0), {**BOTH, Role.DECODE: 3}, "deployed")
    assert pools.orders == [({Role.PREFILL: 2, Role.DECODE: 3}, "deployed")]
    assert scaler.state.target == Sizes(2, 3)
    first = scaler.tick()
    assert first is not None and first.current == Sizes(2, 3), "it decides from there at once"
    before = scaler.decisions(0, 10)
    scaler.reconfigure(config_of(cooldown_in_s=1.0), BOTH, "deployed again")
    assert scaler.decisions(0, 10) == before
    assert scaler.log.next_seq == len(before) + 1


def test_an_order_by_hand_outlives_a_new_configuration() -> None:
    pools = PaperPools()
    scaler = Autoscaler(config_of(mode="off"), pools)
    scaler.pin({Role.PREFILL: 1, Role.DECODE: 4}, "by hand")
    scaler.tick()
    scaler.reconfigure(config_of(mode="off"), BOTH, "deployed")
    scaler.tick()
    assert pools.sizes == {Role.PREFILL: 1, Role.DECODE: 4}
