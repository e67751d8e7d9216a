"""The laws between a raw target and the final sizes, each saying in words what it changed.

Every law takes a plan and returns it, changed or not; `policy.py` says in which order.
"""

from dataclasses import replace

from autoscaler.decision import Driver
from autoscaler.demand import Need, driving_role
from autoscaler.plan import Facts, Plan
from autoscaler.ratio import Sizes, round_down, round_up
from autoscaler.windows import Missing
from cluster.names import Role


def _larger(one: Sizes, other: Sizes) -> Sizes:
    return Sizes(max(one.prefill, other.prefill), max(one.decode, other.decode))


def _smaller(one: Sizes, other: Sizes) -> Sizes:
    return Sizes(min(one.prefill, other.prefill), min(one.decode, other.decode))


def hysteresis(facts: Facts, plan: Plan, need: Need) -> Plan:
    """Hold while the need is near the workers there are."""
    config = facts.config
    count = getattr(facts.current, need.role.value)
    low, high = 1 - config.scale_in_threshold, 1 + config.scale_out_threshold
    if not low <= need.workers / count <= high:
        return plan
    reason = f"{need.workers:.2f} needed over {count} {need.role} workers is in {low:g}..{high:g}"
    return plan.clamp("hysteresis", facts.current, reason)


def one_direction(facts: Facts, plan: Plan, need: Need) -> Plan:
    """Let both pools move the way the driving one does, or not at all."""
    current = facts.current
    before, after = (getattr(sizes, need.role.value) for sizes in (current, plan.sizes))
    if after == before:
        return plan.clamp("one direction", current, f"the {need.role} pool keeps its size")
    towards = _larger if after > before else _smaller
    moved = "grows" if after > before else "shrinks"
    reason = f"the {need.role} pool {moved}, so the other does not go the other way"
    return plan.clamp("one direction", towards(current, plan.sizes), reason)


def dampening(facts: Facts, plan: Plan) -> Plan:
    """Give back a small share of each pool at a time: a wrong scale-in must not hurt much."""
    current = facts.current
    if not current.covers(plan.sizes):
        return plan
    kept = 1 - facts.config.scale_in_step
    decode = max(plan.sizes.decode, round_down(kept * current.decode))
    in_ratio = max(facts.ratio.prefill_for(decode), round_down(kept * current.prefill))
    prefill = max(plan.sizes.prefill, min(current.prefill, in_ratio))
    reason = f"one scale-in gives back {facts.config.scale_in_step:.0%} of a pool, rounded up"
    return plan.clamp("dampening", Sizes(prefill, decode), reason)


def scale_in_guards(facts: Facts, plan: Plan) -> Plan:
    """Take nothing back while that could hurt or nobody can tell."""
    if plan.sizes.covers(facts.current):
        return plan
    for name, reason in _guards(facts):
        plan = plan.clamp(name, facts.current, reason)
    return plan


def _guards(facts: Facts) -> list[tuple[str, str]]:
    config, state = facts.config, facts.state
    guards = []
    if isinstance(facts.signal, Missing):
        guards.append(("missing signal", f"{config.signal}: {facts.signal.reason}"))
    if isinstance(facts.latency, Missing) and not facts.latency.is_idle:
        guards.append(("missing latency", facts.latency.reason))
    if facts.latency_reaches(config.in_latency_guard):
        guard = f"latency is {facts.latency:.3g} of its objective, not below"
        guards.append(("latency guard", f"{guard} {config.in_latency_guard:g}"))
    breached_s = facts.since(state.breached_at)
    if breached_s is not None and breached_s < config.scaled(config.in_guard_s):
        guards.append(("recent latency", f"a latency tier was reached {breached_s:.4g} s ago"))
    if state.backoff_until is not None and facts.now < state.backoff_until:
        left_s = state.backoff_until - facts.now
        guards.append(("backoff", f"the last scale-in was taken back; {left_s:.4g} s to go"))
    return guards


def latency_tiers(facts: Facts, plan: Plan) -> Plan:
    """Grow both pools by a fixed step when latency breaks its objective: the safety layer."""
    config = facts.config
    severe = (config.severe_latency, config.severe_step)
    for level, step in (severe, (config.moderate_latency, config.moderate_step)):
        if facts.latency_reaches(level):
            wanted = facts.ratio.sizes(round_up(facts.current.decode * (1 + step)))
            sizes = _larger(_larger(plan.sizes, facts.current), wanted)
            reason = f"latency is {facts.latency:.3g} of its objective, from {level:g} on"
            grown = plan.clamp("latency tier", sizes, f"{reason} both pools grow by {step:.0%}")
            return plan if grown is plan else grown.driven_by(Driver.LATENCY)
    return plan


def calendar_floor(facts: Facts, plan: Plan) -> Plan:
    """Keep at least what the calendar asks for, in the ratio."""
    window = facts.window
    if window is None or window.kind != "floor":
        return plan
    floor = facts.ratio.sizes(max(window.decode, facts.ratio.decode_for(window.prefill)))
    if plan.sizes.covers(floor):
        return plan
    is_missed = not facts.current.covers(floor)
    sizes = _larger(_larger(plan.sizes, facts.current) if is_missed else plan.sizes, floor)
    plan = plan.clamp("calendar floor", sizes, f"the calendar asks for {floor} in {window}")
    return plan.driven_by(Driver.CALENDAR)


def cooldowns(facts: Facts, plan: Plan) -> Plan:
    """Let an action take effect before the next; severe latency may pass once in a while."""
    config, state = facts.config, facts.state
    cooldown_s = config.scaled(config.cooldown_out_s)
    out_s = facts.since(state.last_out_at)
    if _grows(facts, plan) and out_s is not None and out_s < cooldown_s:
        if _may_bypass(facts, plan):
            return replace(plan, is_bypassing=True)
        reason = f"last scale-out {out_s:.4g} s ago, {cooldown_s:g} s between two"
        plan = plan.clamp("scale-out cooldown", facts.current, reason)
    cooldown_s = config.scaled(config.cooldown_in_s)
    any_s = facts.since(state.last_out_at, state.last_in_at)
    if _shrinks(facts, plan) and any_s is not None and any_s < cooldown_s:
        reason = f"last action {any_s:.4g} s ago, {cooldown_s:g} s before a scale-in"
        plan = plan.clamp("scale-in cooldown", facts.current, reason)
    return plan


def _grows(facts: Facts, plan: Plan) -> bool:
    return not facts.current.covers(plan.sizes)


def _shrinks(facts: Facts, plan: Plan) -> bool:
    return not plan.sizes.covers(facts.current)


def _may_bypass(facts: Facts, plan: Plan) -> bool:
    config = facts.config
    passed_s = facts.since(facts.state.bypassed_at)
    is_first = passed_s is None or passed_s >= config.scaled(config.severe_bypass_s)
    is_safe = not _shrinks(facts, plan)
    return is_first and is_safe and facts.latency_reaches(config.severe_latency)


def within_limits(facts: Facts, plan: Plan) -> Plan:
    """Stay within bounds and budget, both pools together."""
    faults = facts.limits.faults(plan.sizes)
    if not faults:
        return plan
    sizes = facts.limits.between(facts.current, plan.sizes, facts.ratio)
    return plan.clamp("limits", sizes, "; ".join(faults))


def ratio_repair(facts: Facts, plan: Plan) -> Plan:
    """Move the role that follows towards the ratio; the one that the signal sizes stays."""
    current, ratio, config = facts.current, facts.ratio, facts.config
    if driving_role(config) is Role.DECODE:
        count, wanted = current.prefill, ratio.prefill_for(current.decode)
    else:
        count, wanted = current.decode, ratio.decode_for(current.prefill)
    off = count / wanted - 1
    if abs(off) <= config.ratio_tolerance:
        return plan
    following = count + max(-config.ratio_step, min(config.ratio_step, wanted - count))
    if driving_role(config) is Role.DECODE:
        sizes = Sizes(following, current.decode)
    else:
        sizes = Sizes(current.prefill, following)
    reason = f"{count} workers follow where {ratio} asks for {wanted}: {off:+.0%}"
    return plan.clamp("ratio repair", sizes, reason).driven_by(Driver.RATIO)
