"""How well a fleet followed its load, by the decisions it recorded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.decision import Action
from autoscaler.decision_log import Record
from cluster.autoscaler_config import AutoscalerSection
from cluster.names import Role


@dataclass(frozen=True)
class Verdict:
    """How well the fleet followed: decisions after a cooldown, and those that were right.

    `off_ratio` are decisions at which the pools in service were out of ratio and need not have
    been; `waiting` those at which the ready workers there were forbade better.
    """

    num_ticks: int
    num_within: int
    off_ratio: tuple[Record, ...]
    waiting: tuple[Record, ...]
    num_actions: int

    @property
    def share_within(self) -> float:
        return self.num_within / max(1, self.num_ticks)


def judge(records: Sequence[Record], section: AutoscalerSection) -> Verdict:
    """Compare each decision that no cooldown hindered with the published law."""
    cooldown_s, target = section.scaled(section.cooldown_in_s), section.target_per_worker
    assert target is not None
    acted_at, ticks, within, num_actions = -math.inf, 0, 0, 0
    for record in records:
        is_action = record.decision.action is not Action.HOLD
        tps = record.snapshot.decode_tps
        if not is_action and record.now - acted_at >= cooldown_s and isinstance(tps, float):
            needed = math.ceil(tps / target)
            needed = min(max(needed, section.min_decode), section.max_decode)
            ticks += 1
            within += abs(record.decision.final.decode - needed) <= 1
        if is_action:
            num_actions += 1
            acted_at = record.now
    off_ratio, waiting = judge_ratio(records, section)
    return Verdict(ticks, within, off_ratio, waiting, num_actions)


def judge_ratio(
    records: Sequence[Record], section: AutoscalerSection
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Return the decisions at which the pools in service were out of ratio: those at which they
    need not have been, and those at which the ready workers forbade better.

    Better was possible if a ready worker of the role that is behind was held back, or if the
    role that is ahead has been given another worker since the decision before. One that serves
    is never taken back for the ratio. The tolerance is the one the discovery gate works with.
    """
    prefill, decode = section.ratio_pair
    off: tuple[list[Record], list[Record]] = ([], [])
    earlier: dict[Role, int] | None = None
    for record in records:
        pools = {Role.PREFILL: record.snapshot.prefill, Role.DECODE: record.snapshot.decode}
        serving = {role: pool.serving for role, pool in pools.items()}
        weights = {
            Role.PREFILL: serving[Role.PREFILL] * decode,
            Role.DECODE: serving[Role.DECODE] * prefill,
        }
        ahead = max(Role, key=lambda role: weights[role])
        if weights[ahead] > weights[ahead.other] * (1 + section.gate_tolerance) + 1e-9:
            has_grown = earlier is not None and serving[ahead] > earlier[ahead]
            is_avoidable = pools[ahead.other].held > 0 or has_grown
            off[0 if is_avoidable else 1].append(record)
        earlier = serving
    return tuple(off[0]), tuple(off[1])
