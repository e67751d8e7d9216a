"""The signal beside what it is held against, for whoever looks on. Pure.

In tokens/s: `capacity` is what the serving workers should carry, `target` what they should once
the pool has the size wanted. A share of 1: the share that each worker should be busy, of the
whole. A latency: its objective; nobody can say how much is left.
"""

from dataclasses import dataclass
from typing import Any

from autoscaler.demand import driving_role, signal_reading
from autoscaler.ratio import Sizes
from autoscaler.signals import Snapshot
from autoscaler.windows import Missing, Reading
from cluster.autoscaler_config import AutoscalerSection
from cluster.names import Role


@dataclass(frozen=True, slots=True)
class Gauge:
    """One signal; `unit` is `tokens/s`, `share` or `s`."""

    name: str
    unit: str
    role: Role
    value: Reading
    per_worker: float | None
    capacity: float | None
    target: float | None

    def as_document(self) -> dict[str, Any]:
        """Return it with a null for what is missing, and why beside it."""
        is_missing = isinstance(self.value, Missing)
        return {
            "name": self.name,
            "unit": self.unit,
            "role": self.role.value,
            "value": None if is_missing else self.value,
            "missing": self.value.reason if isinstance(self.value, Missing) else None,
            "is_idle": isinstance(self.value, Missing) and self.value.is_idle,
            "per_worker": self.per_worker,
            "capacity": self.capacity,
            "target": self.target,
        }


def read_gauge(config: AutoscalerSection, snapshot: Snapshot, wanted: Sizes) -> Gauge:
    """Return the configured signal as it stands; `wanted` are the sizes decided on."""
    name, role = config.signal, driving_role(config)
    per_worker, value = config.target_per_worker, signal_reading(config, snapshot)
    if name == "ttft" or name == "tbt":
        objective_s = config.slo_ttft_s if name == "ttft" else config.slo_tbt_s
        return Gauge(name, "s", role, value, None, None, objective_s)
    if name.endswith("_util"):
        return Gauge(name, "share", role, value, per_worker, 1.0, per_worker)
    pool, size = (
        (snapshot.decode, wanted.decode)
        if role is Role.DECODE
        else (snapshot.prefill, wanted.prefill)
    )
    capacity = None if per_worker is None else per_worker * pool.serving
    target = None if per_worker is None else per_worker * size
    return Gauge(name, "tokens/s", role, value, per_worker, capacity, target)
