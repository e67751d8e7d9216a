"""From what workers and routers report to what the policy sees: one snapshot of both pools.

Counters of every worker are summed as reports come in, so reading costs the same for ten workers
and ten thousand.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from autoscaler.windows import (
    Missing,
    Reading,
    Total,
    Window,
    latency_total,
    number_total,
    quantile,
    rate,
    reading_as_document,
    reading_from_document,
    share,
)
from cluster.autoscaler_config import AutoscalerSection
from cluster.latency import LatencyCounts
from cluster.load import ClusterLoad, RouterLoad, WorkerLoad
from cluster.names import Role
from cluster.worker_state import WorkerState

_COUNTED_AS = {
    WorkerState.READY: "serving",
    WorkerState.HELD: "held",
    WorkerState.PENDING: "starting",
    WorkerState.STARTING: "starting",
    WorkerState.WARMING: "starting",
    WorkerState.FLIPPING: "starting",
    WorkerState.SOFT_OUT: "soft_out",
    WorkerState.STANDBY: "standby",
}


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """One pool's workers by what they do; draining and stopping ones are no longer counted."""

    serving: int = 0
    held: int = 0
    starting: int = 0
    soft_out: int = 0
    standby: int = 0

    @property
    def ready(self) -> int:
        return self.serving + self.held

    @property
    def provisioned(self) -> int:
        return self.ready + self.starting


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a decision rests on.

    Rates are tokens/s and requests/s, utilisations shares of 1, `prompt_tokens` and
    `output_tokens` means per request. `worker_gpus` is what one worker holds: (prefill, decode).
    """

    prefill: PoolCounts
    decode: PoolCounts
    decode_tps: Reading
    prefill_tps: Reading
    prefill_util: Reading
    decode_util: Reading
    ttft_s: Reading
    tbt_s: Reading
    arrivals_per_s: Reading
    prompt_tokens: Reading
    output_tokens: Reading
    worker_gpus: tuple[float, float] = (0.0, 0.0)

    def as_document(self) -> dict[str, Any]:
        readings = {name: reading_as_document(getattr(self, name)) for name in _READINGS}
        pools = {name: dataclasses.asdict(getattr(self, name)) for name in ("prefill", "decode")}
        return {**pools, **readings, "worker_gpus": list(self.worker_gpus)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {name: reading_from_document(document[name]) for name in _READINGS}
        fields |= {name: PoolCounts(**document[name]) for name in ("prefill", "decode")}
        prefill_gpus, decode_gpus = document["worker_gpus"]
        return cls(**fields, worker_gpus=(float(prefill_gpus), float(decode_gpus)))


def known_signals(snapshot: Snapshot) -> dict[str, float]:
    """Return the readings that are known, by the name the configuration gives each."""
    readings = {
        "decode_tps": snapshot.decode_tps,
        "prefill_tps": snapshot.prefill_tps,
        "decode_util": snapshot.decode_util,
        "prefill_util": snapshot.prefill_util,
        "ttft": snapshot.ttft_s,
        "tbt": snapshot.tbt_s,
        "arrivals": snapshot.arrivals_per_s,
    }
    return {name: value for name, value in readings.items() if not isinstance(value, Missing)}


_READINGS = tuple(f.name for f in dataclasses.fields(Snapshot) if f.type == Reading)


class Signals:
    """The windows behind a snapshot; times are Unix seconds."""

    def __init__(
        self, config: AutoscalerSection, worker_gpus: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        self._config = config
        self._worker_gpus = worker_gpus
        self._workers = {role: _PoolSignals(role, config) for role in Role}
        self._routers = _RouterSignals(config)
        self._at: float | None = None

    def add(self, load: ClusterLoad) -> None:
        """Take in what the cluster reports at `load.at`."""
        elapsed_s = max(0.0, load.at - self._at) if self._at is not None else 0.0
        pools: dict[Role, list[WorkerLoad]] = {role: [] for role in Role}
        for worker in load.workers:
            pools[worker.role].append(worker)
        for role, workers in pools.items():
            self._workers[role].add(load.at, workers, elapsed_s)
        self._routers.add(load.at, load.routers)
        self._at = load.at

    def read(self, now: float) -> Snapshot:
        """Return what is known at `now`."""
        prefill, decode = self._workers[Role.PREFILL], self._workers[Role.DECODE]
        routers = self._routers
        return Snapshot(
            prefill=prefill.counts,
            decode=decode.counts,
            decode_tps=self._known(now, decode) or rate(decode.tokens),
            prefill_tps=self._known(now, prefill) or rate(prefill.tokens),
            prefill_util=self._known(now, prefill) or prefill.utilisation(),
            decode_util=self._known(now, decode) or decode.utilisation(),
            ttft_s=self._known(now, routers) or routers.latency("ttft"),
            tbt_s=self._known(now, routers) or routers.latency("tbt"),
            arrivals_per_s=self._known(now, routers) or rate(routers.recent),
            prompt_tokens=self._known(now, routers) or routers.mean("prompt_tokens"),
            output_tokens=self._known(now, routers) or routers.mean("output_tokens"),
            worker_gpus=self._worker_gpus,
        )

    def _known(self, now: float, source: "_PoolSignals | _RouterSignals") -> Missing | None:
        """Return why nothing from this source can be used, None if it can."""
        stale_s = self._config.window(self._config.stale_s)
        if self._at is not None and now - self._at > stale_s:
            return Missing(f"the last report is {now - self._at:.0f} s old")
        return source.missing


class _PoolSignals:
    """One role's workers."""

    def __init__(self, role: Role, config: AutoscalerSection) -> None:
        length_s = config.window(config.metric_window_s)
        self.counts = PoolCounts()
        self.missing: Missing | None = Missing(f"no {role} worker has been seen")
        self.tokens: Window[float] = Window(length_s)
        self._busy: Window[float] = Window(length_s)
        self._present: Window[float] = Window(length_s)
        self._role = role
        self._stale_s = config.window(config.stale_s)
        self._token_total, self._busy_total, self._present_s = number_total(), number_total(), 0.0

    def add(self, at: float, workers: list[WorkerLoad], elapsed_s: float) -> None:
        counts = dict.fromkeys(dataclasses.asdict(PoolCounts()), 0)
        tokens: dict[tuple[str, int], float] = {}
        busy: dict[tuple[str, int], float] = {}
        num_reporting = num_silent = 0
        for worker in workers:
            kind = _COUNTED_AS.get(worker.state)
            if kind is not None:
                counts[kind] += 1
            if worker.at is None:
                continue
            life = (worker.worker_id, worker.epoch)
            tokens[life] = self._tokens_of(worker)
            if worker.state is WorkerState.READY:
                busy[life] = worker.busy_s
                num_reporting += 1
                num_silent += at - worker.at > self._stale_s
        self.counts = PoolCounts(**counts)
        self.missing = self._why_missing(num_reporting, num_silent)
        self._token_total.update(tokens)
        self._busy_total.update(busy)
        self._present_s += elapsed_s * num_reporting
        self.tokens.record(at, self._token_total.value)
        self._busy.record(at, self._busy_total.value)
        self._present.record(at, self._present_s)

    def utilisation(self) -> Reading:
        """Return the share of time in which a serving worker had a request open."""
        busy = share(self._busy, self._present, f"no {self._role} worker serves")
        # Reports trail the clock by up to a second, so a busy pool can show a little above 1.
        return busy if isinstance(busy, Missing) else min(1.0, busy)

    def _tokens_of(self, worker: WorkerLoad) -> float:
        is_decode = self._role is Role.DECODE
        return float(worker.generated_tokens if is_decode else worker.computed_prompt_tokens)

    def _why_missing(self, num_reporting: int, num_silent: int) -> Missing | None:
        if num_reporting == 0:
            return Missing(f"no serving {self._role} worker has reported")
        if num_silent:
            silent = f"{num_silent} of {num_reporting} serving {self._role} workers"
            return Missing(f"{silent} have not reported for {self._stale_s:g} s")
        return None


_COUNTERS = ("arrived", "finished", "prompt_tokens", "output_tokens")
_PER = {"prompt_tokens": "arrived", "output_tokens": "finished"}


class _RouterSignals:
    """All routers."""

    def __init__(self, config: AutoscalerSection) -> None:
        self.missing: Missing | None = Missing("no router has been seen")
        self.recent: Window[float] = Window(config.window(config.arrival_window_s))
        slow_s = config.window(config.length_window_s)
        self._slow: dict[str, Window[float]] = {
            name: Window(slow_s, least_fill=0.0) for name in _COUNTERS
        }
        self._totals = {name: number_total() for name in _COUNTERS}
        metric_s = config.window(config.metric_window_s)
        self._latency: dict[str, Window[LatencyCounts]] = {
            name: Window(metric_s) for name in ("ttft", "tbt")
        }
        self._latency_totals = {name: latency_total() for name in self._latency}
        self._quantile = config.latency_quantile
        self._stale_s = config.window(config.stale_s)

    def add(self, at: float, routers: tuple[RouterLoad, ...]) -> None:
        self.missing = self._why_missing(at, routers)
        for name, total in self._totals.items():
            _update(total, routers, name)
            self._slow[name].record(at, total.value)
        for name, latencies in self._latency_totals.items():
            _update(latencies, routers, name)
            self._latency[name].record(at, latencies.value)
        self.recent.record(at, self._totals["arrived"].value)

    def latency(self, name: str) -> Reading:
        return quantile(self._latency[name], self._quantile)

    def mean(self, name: str) -> Reading:
        """Return tokens per request over the slow window, or over what there is of it."""
        return share(self._slow[name], self._slow[_PER[name]], "no request in the window")

    def _why_missing(self, at: float, routers: tuple[RouterLoad, ...]) -> Missing | None:
        if not routers:
            return Missing("no router has reported")
        num_silent = sum(at - router.at > self._stale_s for router in routers)
        if num_silent:
            silent = f"{num_silent} of {len(routers)} routers"
            return Missing(f"{silent} have not reported for {self._stale_s:g} s")
        return None


def _update(total: Total[Any], routers: tuple[RouterLoad, ...], name: str) -> None:
    total.update({router.router_id: getattr(router, name) for router in routers})
