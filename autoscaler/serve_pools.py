"""What Ray Serve tells a policy about an application, as two pools in our own words. Pure.

Ray's contexts are read by what they offer, so nothing here imports Ray. Counters come as series of
samples: `Point`s of the last `look_back_period_s`, sent every `metrics_interval_s`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self

from autoscaler.ratio import Sizes
from cluster.autoscaler_config import AutoscalerSection
from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.load import ClusterLoad, WorkerLoad
from cluster.names import Role, WorkerId
from cluster.worker_state import WorkerState

# The names under which replicas report; both count from the replica's start.
GENERATED_TOKENS = "tandem_generated_tokens"
COMPUTED_PROMPT_TOKENS = "tandem_computed_prompt_tokens"
COUNTERS = {Role.PREFILL: COMPUTED_PROMPT_TOKENS, Role.DECODE: GENERATED_TOKENS}

# A replica that misses two reports in a row no longer holds up the reading of the others.
_REPORTS_WAITED_FOR = 2

_DELAYS = ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s")

_SIGNALS = ("decode_tps", "prefill_tps")
_OF_THE_DEPLOYMENT = "bounds are the deployment's own: set its min_replicas and max_replicas"
_UNKNOWN_TO_SERVE = "Serve's replicas report token counts only: leave it out"
_NOT_HERE = {
    "min_prefill": _OF_THE_DEPLOYMENT,
    "max_prefill": _OF_THE_DEPLOYMENT,
    "min_decode": _OF_THE_DEPLOYMENT,
    "max_decode": _OF_THE_DEPLOYMENT,
    "gpu_budget": f"Ray does not tell a policy of GPUs, and {_OF_THE_DEPLOYMENT}",
    "slo_ttft_s": _UNKNOWN_TO_SERVE,
    "slo_tbt_s": _UNKNOWN_TO_SERVE,
    "arrival_term": _UNKNOWN_TO_SERVE,
    "ratio_estimation": _UNKNOWN_TO_SERVE,
}


class Point(Protocol):
    """One sample; `timestamp` in Unix seconds by the replica's clock."""

    timestamp: float
    value: float


class Context(Protocol):
    """The part of Ray's `AutoscalingContext` that counts here."""

    deployment_name: str
    target_num_replicas: int
    running_replicas: Sequence[Any]
    raw_metrics: Mapping[str, Mapping[Any, Sequence[Point]]] | None
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]
    current_time: float
    config: Any


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The policy's keyword arguments: name patterns of the two deployments, and `autoscaler:`."""

    prefill: str
    decode: str
    autoscaler: Mapping[str, Any]

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """Return the settings; raise `ConfigError` naming every fault."""
        section = document.get("autoscaler", {})
        faults = [
            f"unknown key {key} (known: prefill, decode, autoscaler)"
            for key in document
            if key not in ("prefill", "decode", "autoscaler")
        ]
        for role in ("prefill", "decode"):
            pattern = document.get(role)
            if not isinstance(pattern, str) or not pattern:
                faults.append(f'{role}: give the name of its deployment, or a pattern as "P*"')
        if isinstance(section, Mapping):
            faults += _section_faults(section)
        else:
            faults.append(f"autoscaler: give a mapping (got {section!r})")
        if faults:
            raise ConfigError("; ".join(faults))
        return cls(document["prefill"], document["decode"], section)

    def section(self, bounds: tuple[Sizes, Sizes]) -> AutoscalerSection:
        """Return the section within (fewest, most); raise `ConfigError` if it does not fit."""
        fewest, most = bounds
        fixed = {
            "arrival_term": False,
            "min_prefill": fewest.prefill,
            "min_decode": fewest.decode,
            "max_prefill": most.prefill,
            "max_decode": most.decode,
        }
        return parse_config({"autoscaler": {"mode": "act", **self.autoscaler, **fixed}}).autoscaler


def _section_faults(section: Mapping[str, Any]) -> Iterator[str]:
    for key, why in _NOT_HERE.items():
        if key in section:
            yield f"autoscaler.{key}: {why}"
    signal = section.get("signal", _SIGNALS[0])
    if signal not in _SIGNALS:
        yield f"autoscaler.signal: under Serve one of {', '.join(_SIGNALS)} (got {signal!r})"


@dataclass(frozen=True, slots=True)
class ServePools:
    """The two deployments that scale together."""

    prefill: Context
    decode: Context

    @classmethod
    def choose(cls, settings: ServeSettings, contexts: Mapping[Any, Context]) -> Self:
        """Return the two that the patterns name; raise `ConfigError` unless each names one."""
        prefill = _only_match("prefill", settings.prefill, contexts)
        decode = _only_match("decode", settings.decode, contexts)
        if prefill is decode:
            raise ConfigError(f"prefill and decode both name {prefill.deployment_name}")
        return cls(prefill, decode)

    @property
    def both(self) -> tuple[Context, Context]:
        return self.prefill, self.decode

    @property
    def now(self) -> float:
        return self.decode.current_time

    @property
    def targets(self) -> Sizes:
        return Sizes(self.prefill.target_num_replicas, self.decode.target_num_replicas)

    @property
    def bounds(self) -> tuple[Sizes, Sizes]:
        """Return (fewest, most): Ray's, but never none, since requests need both pools."""
        fewest = [max(1, each.capacity_adjusted_min_replicas) for each in self.both]
        most = [max(1, each.capacity_adjusted_max_replicas) for each in self.both]
        return Sizes(*fewest), Sizes(*most)

    def check(self) -> None:
        """Raise `ConfigError` if Ray would move the two apart after the decision.

        Ray applies delays and factors to each deployment by itself. Even equal factors part them:
        they count from the replicas that run, and one pool may start slower than the other.
        """
        faults = [*_delay_faults(self), *_factor_faults(self)]
        if faults:
            raise ConfigError("; ".join(faults))

    def known_until(self) -> float:
        """Return the time up to which every replica that still reports has done so."""
        interval_s = max(float(each.config.metrics_interval_s) for each in self.both)
        oldest = self.now - _REPORTS_WAITED_FOR * interval_s
        newest = [series[-1].timestamp for each in self._series() for series in each.values()]
        return min(max(oldest, min(newest, default=oldest)), self.now)

    def load(self, at: float) -> ClusterLoad:
        """Return every replica's counters as they stood at `at`."""
        prefill, decode = self._series()
        return ClusterLoad(
            at,
            (
                *_workers(Role.PREFILL, self.prefill, prefill, at),
                *_workers(Role.DECODE, self.decode, decode, at),
            ),
        )

    def _series(self) -> tuple[Mapping[Any, Sequence[Point]], Mapping[Any, Sequence[Point]]]:
        return _reported(self.prefill, Role.PREFILL), _reported(self.decode, Role.DECODE)


def _only_match(role: str, pattern: str, contexts: Mapping[Any, Context]) -> Context:
    matching = [each for each in contexts.values() if fnmatchcase(each.deployment_name, pattern)]
    if len(matching) == 1:
        return matching[0]
    there = ", ".join(sorted(each.deployment_name for each in matching or contexts.values()))
    if matching:
        raise ConfigError(f"{role}: {pattern!r} names more than one deployment: {there}")
    raise ConfigError(f"{role}: {pattern!r} names no deployment with autoscaling_config ({there})")


def _delay_faults(pools: ServePools) -> Iterator[str]:
    prefill, decode = pools.both
    for name in _DELAYS:
        one, other = getattr(prefill.config, name), getattr(decode.config, name)
        if one != other:
            yield (
                f"{name} is {one} for {prefill.deployment_name} and {other} for"
                f" {decode.deployment_name}: give both the same, or they move apart"
            )


def _factor_faults(pools: ServePools) -> Iterator[str]:
    for each in pools.both:
        factors = {
            "upscaling_factor": each.config.get_upscaling_factor(),
            "downscaling_factor": each.config.get_downscaling_factor(),
        }
        for name, factor in factors.items():
            if factor != 1:
                yield (
                    f"{name} is {factor:g} for {each.deployment_name}: leave it out,"
                    " the policy's own steps keep the ratio"
                )


def _reported(context: Context, role: Role) -> dict[Any, Sequence[Point]]:
    """Return the samples of the role's counter by replica, empty series left out."""
    metrics = context.raw_metrics or {}
    return {
        replica: series for replica, series in metrics.get(COUNTERS[role], {}).items() if series
    }


def _workers(
    role: Role, context: Context, reported: Mapping[Any, Sequence[Point]], at: float
) -> Iterator[WorkerLoad]:
    for replica in context.running_replicas:
        worker = WorkerLoad(WorkerId(replica.unique_id), role, WorkerState.READY, epoch=0)
        series = reported.get(replica)
        yield worker if series is None else _with_counters(worker, series, at)
    for index in range(context.target_num_replicas - len(context.running_replicas)):
        name = WorkerId(f"{context.deployment_name}#{index}")
        yield WorkerLoad(name, role, WorkerState.PENDING, epoch=0)


def _with_counters(worker: WorkerLoad, series: Sequence[Point], at: float) -> WorkerLoad:
    tokens = int(counter_at(series, at))
    is_decode = worker.role is Role.DECODE
    return WorkerLoad(
        worker.worker_id,
        worker.role,
        worker.state,
        worker.epoch,
        at=series[-1].timestamp,
        generated_tokens=tokens if is_decode else 0,
        computed_prompt_tokens=0 if is_decode else tokens,
    )


def counter_at(series: Sequence[Point], at: float) -> float:
    """Return the counter at a time, on the line between two samples; flat before and after."""
    index = bisect_right(series, at, key=lambda point: point.timestamp)
    if index in (0, len(series)):
        return series[min(index, len(series) - 1)].value
    before, after = series[index - 1], series[index]
    share = (at - before.timestamp) / (after.timestamp - before.timestamp)
    return before.value + share * (after.value - before.value)
