"""Snapshots and configurations for the policy's tests, and a clock that walks through decisions."""

from dataclasses import dataclass, field, replace
from typing import Any

from autoscaler.decision import Action, Decision, PolicyState
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts, Snapshot
from autoscaler.windows import Missing
from cluster.autoscaler_config import AutoscalerSection

IDLE = Missing("no request in the window", is_idle=True)
STALE = Missing("the last report is 130 s old")
START = 1_800_000_000.0  # a Friday, 08:00 UTC


def section(**changes: Any) -> AutoscalerSection:
    """Return a section that acts on decode TPS at 100 tokens/s per worker, without arrivals."""
    plain: dict[str, Any] = {
        "mode": "act",
        "target_per_worker": 100.0,
        "max_prefill": 40,
        "max_decode": 40,
        "arrival_term": False,
        "slo_tbt_s": 0.1,
    }
    return AutoscalerSection.model_validate({**plain, **changes})


def snapshot(**changes: Any) -> Snapshot:
    """Return a snapshot of quiet pools: no load, latency far below its objective."""
    quiet = Snapshot(
        prefill=PoolCounts(serving=4),
        decode=PoolCounts(serving=4),
        decode_tps=0.0,
        prefill_tps=0.0,
        prefill_util=0.0,
        decode_util=0.0,
        ttft_s=IDLE,
        tbt_s=0.02,
        arrivals_per_s=0.0,
        prompt_tokens=IDLE,
        output_tokens=IDLE,
    )
    return replace(quiet, **changes)


def state(prefill: int, decode: int, **changes: Any) -> PolicyState:
    return replace(PolicyState(Sizes(prefill, decode)), **changes)


@dataclass
class Walk:
    """A clock that walks: one decision per step, each on the state that the last one left."""

    config: AutoscalerSection
    state: PolicyState
    now: float = START
    decisions: list[Decision] = field(default_factory=list)

    def step(self, sample: Snapshot, seconds: float = 30.0) -> Decision:
        self.now += seconds
        decision, self.state = decide(self.config, self.state, sample, self.now)
        self.decisions.append(decision)
        return decision

    def steps(self, sample: Snapshot, count: int, seconds: float = 30.0) -> list[Decision]:
        return [self.step(sample, seconds) for _ in range(count)]

    @property
    def sizes(self) -> Sizes:
        return self.state.target

    def moves(self) -> list[tuple[float, Action, Sizes]]:
        """Return (seconds since the start, action, sizes) of every decision that moved."""
        return [
            (decision.now - START, decision.action, decision.final)
            for decision in self.decisions
            if decision.action is not Action.HOLD
        ]
