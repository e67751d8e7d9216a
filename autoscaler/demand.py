"""How many workers the load needs, by what is measured now and by what is arriving.

Measured throughput cannot exceed capacity, so a burst above it shows in arrivals first.
"""

import math
from dataclasses import dataclass

from autoscaler.decision import Driver
from autoscaler.ratio import Ratio, Sizes, round_up
from autoscaler.signals import Snapshot
from autoscaler.windows import Missing, Reading
from cluster.autoscaler_config import AutoscalerSection
from cluster.names import Role

# Arrivals count only as far as chance cannot explain them: two standard deviations less.
_DEVIATIONS = 2.0


@dataclass(frozen=True, slots=True)
class Need:
    """Workers of the driving role that the load needs; the other role follows by the ratio."""

    role: Role
    workers: float
    driver: Driver
    reason: str

    def sizes(self, ratio: Ratio) -> Sizes:
        count = round_up(self.workers)
        return ratio.sizes(count if self.role is Role.DECODE else ratio.decode_for(count))


def driving_role(config: AutoscalerSection) -> Role:
    """Return the role that the signal sizes."""
    return Role.PREFILL if config.signal.startswith("prefill_") else Role.DECODE


def signal_reading(config: AutoscalerSection, snapshot: Snapshot) -> Reading:
    """Return the configured signal's value."""
    readings = {
        "decode_tps": snapshot.decode_tps,
        "prefill_tps": snapshot.prefill_tps,
        "decode_util": snapshot.decode_util,
        "prefill_util": snapshot.prefill_util,
        "ttft": snapshot.ttft_s,
        "tbt": snapshot.tbt_s,
    }
    return readings[config.signal]


def latency_ratio(config: AutoscalerSection, snapshot: Snapshot) -> Reading:
    """Return the worst latency over its objective; idle where none is set or no request came."""
    watched = [
        reading if isinstance(reading, Missing) else reading / objective_s
        for reading, objective_s in (
            (snapshot.ttft_s, config.slo_ttft_s),
            (snapshot.tbt_s, config.slo_tbt_s),
        )
        if objective_s is not None
    ]
    known = [each for each in watched if not isinstance(each, Missing)]
    unknown = [each for each in watched if isinstance(each, Missing) and not each.is_idle]
    if known:
        return max(known)
    return next(iter(unknown), Missing("no latency is watched or none was seen", is_idle=True))


def arriving_tps(config: AutoscalerSection, snapshot: Snapshot) -> Reading:
    """Return tokens/s that arriving requests will need in the driving role."""
    if not config.arrival_term or not config.signal.endswith("_tps"):
        return Missing("not used", is_idle=True)
    is_decode = driving_role(config) is Role.DECODE
    tokens = snapshot.output_tokens if is_decode else snapshot.prompt_tokens
    if isinstance(snapshot.arrivals_per_s, Missing):
        return snapshot.arrivals_per_s
    if isinstance(tokens, Missing):
        return tokens
    window_s = config.window(config.arrival_window_s)
    num_arrived = snapshot.arrivals_per_s * window_s
    return max(0.0, num_arrived - _DEVIATIONS * math.sqrt(num_arrived)) / window_s * tokens


def measured_need(config: AutoscalerSection, snapshot: Snapshot) -> Need | None:
    """Return the need by the signal; None without a value, or for a latency: it has no target."""
    value, target = signal_reading(config, snapshot), config.target_per_worker
    if isinstance(value, Missing) or target is None or config.signal in ("ttft", "tbt"):
        return None
    role = driving_role(config)
    says = f"{config.signal} {value:.4g} at {target:g} per worker"
    if config.signal.endswith("_util"):
        serving = snapshot.decode.serving if role is Role.DECODE else snapshot.prefill.serving
        value *= serving
        says += f" on {serving} serving"
    needed = value / target
    return Need(role, needed, Driver.SIGNAL, f"{says} needs {needed:.2f} {role} workers")


def arriving_need(config: AutoscalerSection, snapshot: Snapshot) -> Need | None:
    """Return the need by what is arriving, None where that is unknown or not asked for."""
    value, target = arriving_tps(config, snapshot), config.target_per_worker
    if isinstance(value, Missing) or target is None:
        return None
    role = driving_role(config)
    needed = value / target
    reason = f"arriving {value:.4g} tokens/s at {target:g} per worker need {needed:.2f} {role}"
    return Need(role, needed, Driver.ARRIVALS, f"{reason} workers")
