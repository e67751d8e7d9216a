"""One decision for both pools: snapshot and state in, sizes with their reasons out. Pure.

One signal sizes the driving role and the ratio the other one. In order of precedence: sizes
pinned by hand (within the limits), limits that the present sizes break, fixed calendar windows,
taking a scale-in back, and the load. Whoever calls this keeps the pools at the decided sizes; dead
workers are not its business.
"""

from dataclasses import replace

from autoscaler.decision import Action, Decision, Driver, Input, PolicyState
from autoscaler.demand import (
    Need,
    arriving_need,
    arriving_tps,
    driving_role,
    latency_ratio,
    measured_need,
    signal_reading,
)
from autoscaler.laws import (
    calendar_floor,
    cooldowns,
    dampening,
    hysteresis,
    latency_tiers,
    one_direction,
    ratio_repair,
    scale_in_guards,
    within_limits,
)
from autoscaler.limits import Limits
from autoscaler.plan import Facts, Plan, calendar_window
from autoscaler.ratio import Ratio, Sizes, reestimate, round_down
from autoscaler.signals import Snapshot
from autoscaler.windows import Missing
from cluster.autoscaler_config import AutoscalerSection


def decide(
    config: AutoscalerSection, state: PolicyState, snapshot: Snapshot, now: float
) -> tuple[Decision, PolicyState]:
    """Return the sizes from `now` on and the state for the next decision."""
    facts = _look(config, state, snapshot, now)
    if state.decided_at == now and state.pin is None:
        plan = Plan(Driver.NOTHING, None, state.target, "no time has passed since the last")
        return _decision(facts, plan), state
    plan = (
        _pinned(facts)
        or _inside_limits(facts)
        or _fixed_window(facts)
        or _taken_back(facts)
        or _from_load(facts)
    )
    decision = _decision(facts, plan)
    return decision, _next_state(facts, plan, decision)


def _look(config: AutoscalerSection, state: PolicyState, snapshot: Snapshot, now: float) -> Facts:
    decided_at = now if state.decided_at is None else state.decided_at
    state = state.by_clock(now, config.scaled(config.backoff_s))
    return Facts(
        config=config,
        state=state,
        snapshot=snapshot,
        now=now,
        signal=signal_reading(config, snapshot),
        latency=latency_ratio(config, snapshot),
        ratio=_ratio(config, state, snapshot, now),
        limits=Limits.configured(config, snapshot.worker_gpus),
        window=calendar_window(config, now),
        set_back_s=max(0.0, decided_at - now),
    )


def _ratio(config: AutoscalerSection, state: PolicyState, snapshot: Snapshot, now: float) -> Ratio:
    """Return the configured ratio, or the estimate that follows the observed lengths."""
    if not config.ratio_estimation:
        return Ratio.configured(config)
    known = state.estimated_ratio
    previous = Ratio.configured(config) if known is None else Ratio(known)
    prompt, output = snapshot.prompt_tokens, snapshot.output_tokens
    if isinstance(prompt, Missing) or isinstance(output, Missing) or min(prompt, output) <= 0:
        return previous
    elapsed_s = 0.0 if state.decided_at is None else max(0.0, now - state.decided_at)
    return reestimate(config, previous, (prompt, output), elapsed_s)


def _inside_limits(facts: Facts) -> Plan | None:
    """Bring sizes inside limits that have been narrowed around them, at once."""
    faults = facts.limits.faults(facts.current)
    if not faults:
        return None
    sizes = facts.limits.nearest(facts.current, facts.ratio)
    plan = Plan(Driver.LIMITS, facts.current, facts.current, "the present sizes break a limit")
    return plan.clamp("limits", sizes, "; ".join(faults))


def _pinned(facts: Facts) -> Plan | None:
    """Follow an order given by hand at once: only the limits stand above it."""
    pin = facts.state.pin
    if pin is None:
        return None
    plan = Plan(Driver.PIN, pin.sizes, pin.sizes, pin.reason)
    return _to_nearest_allowed(facts, plan)


def _fixed_window(facts: Facts) -> Plan | None:
    """Follow a fixed calendar window: no signal counts in it, cooldowns do."""
    window = facts.window
    if window is None or window.kind != "fixed":
        return None
    sizes = Sizes(window.prefill, window.decode)
    plan = Plan(Driver.CALENDAR, sizes, sizes, f"the calendar fixes {sizes} in {window}")
    return cooldowns(facts, _to_nearest_allowed(facts, plan))


def _to_nearest_allowed(facts: Facts, plan: Plan) -> Plan:
    faults = facts.limits.faults(plan.sizes)
    if not faults:
        return plan
    return plan.clamp("limits", facts.limits.nearest(plan.sizes, facts.ratio), "; ".join(faults))


def _taken_back(facts: Facts) -> Plan | None:
    """Restore the workers of a scale-in that is under observation and broke the objective."""
    before = facts.state.size_before_in
    if before is None or not _is_observed(facts):
        return None
    config, latency = facts.config, facts.latency
    if isinstance(latency, Missing) or latency <= config.restore_latency:
        return None
    sizes = Sizes(
        max(before.prefill, facts.current.prefill), max(before.decode, facts.current.decode)
    )
    reason = f"latency is {latency:.3g} of its objective after a scale-in, above"
    plan = Plan(Driver.OBSERVATION, sizes, sizes, f"{reason} {config.restore_latency:g}")
    return within_limits(facts, plan)


def _is_observed(facts: Facts) -> bool:
    shrunk_s = facts.since(facts.state.last_in_at)
    return shrunk_s is not None and shrunk_s <= facts.config.scaled(facts.config.soft_in_s)


def _from_load(facts: Facts) -> Plan:
    """Follow the load: proportional control, the latency tiers above it, floors under it."""
    plan = _proportional(facts)
    plan = dampening(facts, plan)
    plan = scale_in_guards(facts, plan)
    plan = latency_tiers(facts, plan)
    plan = calendar_floor(facts, plan)
    plan = cooldowns(facts, plan)
    plan = within_limits(facts, plan)
    is_calm = all(clamp.name in _CALM for clamp in plan.clamps)
    if plan.sizes != facts.current or not is_calm or isinstance(facts.signal, Missing):
        return plan
    plan = ratio_repair(facts, plan)
    plan = scale_in_guards(facts, plan)
    plan = cooldowns(facts, plan)
    return within_limits(facts, plan)


# Laws that leave nothing pending: with only these at work the ratio may be repaired.
_CALM = frozenset({"hysteresis", "one direction"})


def _proportional(facts: Facts) -> Plan:
    """Return the sizes that the largest need asks for."""
    config, snapshot = facts.config, facts.snapshot
    if config.signal in ("ttft", "tbt"):
        return _by_latency(facts)
    needs = [measured_need(config, snapshot), arriving_need(config, snapshot)]
    known = [need for need in needs if need is not None]
    if not known:
        reason = facts.signal.reason if isinstance(facts.signal, Missing) else "no target is set"
        return Plan(Driver.NOTHING, None, facts.current, f"{config.signal}: {reason}")
    need = _largest(known)
    raw = need.sizes(facts.ratio)
    plan = Plan(need.driver, raw, raw, need.reason)
    return one_direction(facts, hysteresis(facts, plan, need), need)


def _largest(needs: list[Need]) -> Need:
    return max(needs, key=lambda need: need.workers)


def _by_latency(facts: Facts) -> Plan:
    """Shrink while latency is far below its objective; growing is for the latency tiers."""
    config, current = facts.config, facts.current
    plan = Plan(Driver.NOTHING, None, current, f"{config.signal} sizes by the latency tiers")
    if isinstance(facts.latency, Missing) or facts.latency > config.in_latency:
        return plan
    decode = round_down(current.decode * (1 - config.scale_in_step))
    reason = f"latency is {facts.latency:.3g} of its objective, up to {config.in_latency:g}"
    raw = facts.ratio.sizes(decode)
    need = Need(driving_role(config), float(decode), Driver.SIGNAL, reason)
    return one_direction(facts, Plan(Driver.SIGNAL, raw, raw, reason), need)


def _decision(facts: Facts, plan: Plan) -> Decision:
    final, action = plan.sizes, _action(facts, plan)
    moved = f"{facts.current} stays" if final == facts.current else f"{facts.current} to {final}"
    laws_at_work = f"; {plan.clamps[-1].name}: {plan.clamps[-1].reason}" if plan.clamps else ""
    if facts.set_back_s:
        laws_at_work += f"; the clock was set back {facts.set_back_s:.4g} s: cooldowns begin anew"
    return Decision(
        now=facts.now,
        inputs=_inputs(facts),
        current=facts.current,
        raw=plan.raw,
        clamps=plan.clamps,
        final=final,
        action=action,
        driver=plan.driver,
        reason=f"{moved}: {plan.reason}{laws_at_work}",
    )


def _inputs(facts: Facts) -> tuple[Input, ...]:
    arriving = arriving_tps(facts.config, facts.snapshot)
    return (
        Input(facts.config.signal, facts.signal),
        Input("latency_over_objective", facts.latency),
        Input("arriving_tps", arriving),
        Input("ratio", facts.ratio.value),
    )


def _action(facts: Facts, plan: Plan) -> Action:
    current, final = facts.current, plan.sizes
    if final == current:
        return Action.HOLD
    if plan.driver is Driver.OBSERVATION:
        return Action.RESTORE
    is_mixed = not final.covers(current) and not current.covers(final)
    if plan.driver is Driver.RATIO or is_mixed:
        return Action.REPAIR
    return Action.OUT if final.covers(current) else Action.IN


def _next_state(facts: Facts, plan: Plan, decision: Decision) -> PolicyState:
    state, config, now = facts.state, facts.config, facts.now
    current, final = facts.current, decision.final
    grows, shrinks = not current.covers(final), not final.covers(current)
    is_restored = decision.action is Action.RESTORE
    return replace(
        state,
        target=final,
        decided_at=now,
        last_out_at=now if grows else state.last_out_at,
        last_in_at=now if shrinks else state.last_in_at,
        bypassed_at=now if plan.is_bypassing and grows else state.bypassed_at,
        breached_at=now if facts.latency_reaches(config.moderate_latency) else state.breached_at,
        backoff_until=now + config.scaled(config.backoff_s) if is_restored else state.backoff_until,
        size_before_in=_size_before_in(facts, decision),
        estimated_ratio=facts.ratio.value if config.ratio_estimation else None,
    )


def _size_before_in(facts: Facts, decision: Decision) -> Sizes | None:
    """Return what a scale-in can still be taken back to: only the load's own can."""
    by_load = (Driver.SIGNAL, Driver.ARRIVALS, Driver.RATIO)
    if decision.final != facts.current:
        is_load = decision.driver in by_load and facts.current.covers(decision.final)
        return facts.current if is_load else None
    return facts.state.size_before_in if _is_observed(facts) else None
