"""What a controller exports: both pools, what the autoscaler sees and decides, and how long
changes of workers take."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from cluster import metrics
from cluster.action_times import ActionTimes, Begun, Change
from cluster.config import TandemConfig
from cluster.names import Role
from cluster.reconcile import health, refused_pairs
from cluster.worker_state import Observed, WorkerState

# More than a controller takes over from the one before.
_PAGE = 1000


class Scaler(Protocol):
    """What is read of the autoscaler."""

    def signals(self) -> Mapping[str, float]: ...

    def decisions(self, after: int, limit: int) -> list[dict[str, Any]]: ...


class ControllerMetrics:
    """Told at every turn of the controller's loop how things stand."""

    def __init__(self, config: TandemConfig) -> None:
        self._times = ActionTimes()
        self._last_seq: int | None = None
        self._shown: set[str] = set()
        for change in Change:
            metrics.ACTIONS.labels(change.value)
            metrics.ACTION_SECONDS.labels(change.value)
        for role in Role:
            metrics.WORKER_FAILURES.labels(role.value)
        self.reconfigure(config)

    def reconfigure(self, config: TandemConfig) -> None:
        """Go by another configuration from now on."""
        self._config = config.autoscaler
        prefill, decode = self._config.ratio_pair
        self._configured_ratio = self._ratio = prefill / decode
        for role in Role:
            for bound in ("min", "max"):
                limit = getattr(self._config, f"{bound}_{role.value}")
                metrics.POOL_LIMIT_WORKERS.labels(role.value, bound).set(limit)
        metrics.OBJECTIVE_RATIO.set(self._config.latency_quantile)
        metrics.OBJECTIVE_SECONDS.clear()
        metrics.SIGNAL_TARGET.clear()
        objectives = {"ttft": self._config.slo_ttft_s, "tbt": self._config.slo_tbt_s}
        for name, objective_s in objectives.items():
            if objective_s is not None:
                metrics.OBJECTIVE_SECONDS.labels(name).set(objective_s)

    def show(
        self, observed: Observed, wanted: Mapping[Role, int], scaler: Scaler, now: float
    ) -> None:
        """Export workers, signals and what has been decided and done since the last call."""
        ready = {role: len(observed.pool(role, WorkerState.READY)) for role in Role}
        self._show_pools(observed, wanted, ready)
        self._show_signals(scaler.signals(), ready)
        for news in self._times.look(observed.workers, now):
            if isinstance(news, Begun):
                metrics.ACTIONS.labels(news.change.value).inc()
            else:
                metrics.ACTION_SECONDS.labels(news.change.value).observe(news.seconds)
        self._show_decisions(scaler)

    def show_surroundings(self, epoch: int, num_routers: int, num_unplaced: int) -> None:
        metrics.EPOCH.set(epoch)
        metrics.ROUTERS.set(num_routers)
        metrics.UNPLACED.set(num_unplaced)

    def _show_pools(
        self, observed: Observed, wanted: Mapping[Role, int], ready: Mapping[Role, int]
    ) -> None:
        metrics.HEALTHY.set(health(observed)[0])
        metrics.REFUSED_PAIRS.set(len(refused_pairs(observed)))
        counts = Counter((worker.role, worker.state) for worker in observed.workers)
        for role in Role:
            metrics.WANTED_WORKERS.labels(role.value).set(wanted[role])
            for state in WorkerState:
                metrics.WORKERS.labels(role.value, state.value).set(counts[role, state])
        prefill, decode = ready[Role.PREFILL], ready[Role.DECODE]
        metrics.READY_RATIO.set(prefill / decode if decode else float("nan"))
        metrics.TARGET_RATIO.set(self._ratio)

    def _show_signals(self, signals: Mapping[str, float], ready: Mapping[Role, int]) -> None:
        for name in self._shown - signals.keys():
            metrics.SIGNAL.remove(name)
        self._shown = set(signals)
        for name, value in signals.items():
            metrics.SIGNAL.labels(name).set(value)
        if (target := self._signal_target(ready)) is not None:
            metrics.SIGNAL_TARGET.labels(self._config.signal).set(target)

    def _signal_target(self, ready: Mapping[Role, int]) -> float | None:
        """Return what the Ready workers should carry, in the signal's unit."""
        name, per_worker = self._config.signal, self._config.target_per_worker
        if name in ("ttft", "tbt"):
            return self._config.slo_ttft_s if name == "ttft" else self._config.slo_tbt_s
        if per_worker is None or name.endswith("_util"):
            return per_worker
        role = Role.PREFILL if name.startswith("prefill") else Role.DECODE
        return per_worker * ready[role]

    def _show_decisions(self, scaler: Scaler) -> None:
        """Count new decisions; those of an earlier controller were counted by it."""
        page = scaler.decisions(self._last_seq or 0, _PAGE)
        if self._last_seq is not None:
            for record in page:
                decision = record["decision"]
                metrics.DECISIONS.labels(decision["action"], decision["driver"]).inc()
        if page:
            self._last_seq = page[-1]["seq"]
            self._show_decision(page[-1])
        elif self._last_seq is None:
            self._last_seq = 0

    def _show_decision(self, record: Mapping[str, Any]) -> None:
        decision = record["decision"]
        self._ratio = record["state"]["estimated_ratio"] or self._configured_ratio
        targets = {
            metrics.RAW_TARGET_WORKERS: decision["raw"],
            metrics.FINAL_TARGET_WORKERS: decision["final"],
        }
        for gauge, sizes in targets.items():
            if sizes is None:
                gauge.clear()
                continue
            for role, size in zip((Role.PREFILL, Role.DECODE), sizes, strict=True):
                gauge.labels(role.value).set(size)
