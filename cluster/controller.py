"""The controller: keeps both pools at their size and knows which workers may serve.

It executes what `reconcile.decide` returns and holds no policy of its own; sizes come from the
autoscaler, which runs beside it. What it knows is written to a `ControllerStore` at every change,
so that the next controller goes on where this one ended; an epoch keeps two from acting at once.
It runs without Ray: `cluster/ray_plane.py` provides the processes and the store.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any

from cluster import reconcile
from cluster.config import TandemConfig
from cluster.controller_metrics import ControllerMetrics
from cluster.controller_store import ControllerStore
from cluster.errors import Unavailable
from cluster.history import History
from cluster.load import ClusterLoad, RouterLoad
from cluster.members import Launcher
from cluster.names import Role, RouterId
from cluster.overview import scales, state_document
from cluster.placer import Orders, Placer
from cluster.pool_scaler import PoolScaler
from cluster.pools import Pools
from cluster.reconcile import refused_pairs
from cluster.reconfigure import InForce, judge
from cluster.service import Counts, service_of
from cluster.snapshot import WorkerEntry
from cluster.targets import Address, target_list
from cluster.worker_spec import Parts, load
from cluster.worker_state import (
    Desired,
    Enter,
    ProveHandoff,
    StartWorker,
    StopWorker,
    TakeRole,
)
from cluster.workforce import Workforce

TICK_S = 0.5
# Others' needs are looked at this often, even if nothing is to be started here.
PLACEMENT_PERIOD_S = 2.0
# Who gave workers up for a service of higher priority asks for them again after this long.
YIELD_S = 60.0
MAX_EVENTS = 200
# A router that has not reported for this long is gone, and its latencies with it.
_ROUTER_KEPT_S = 60.0
# Routers report twice a second.
ROUTER_TARGET_KEPT_S = 10.0

logger = logging.getLogger(__name__)


class Controller:
    """Owns the workers of one deployment. Fills `Pools` for the autoscaler.

    Workers listen on `bind_host`, or each on its node's address if that is None. Without a
    `placer` they start wherever the launcher puts them.
    """

    def __init__(
        self,
        config: TandemConfig,
        parts: Parts,
        launcher: Launcher,
        store: ControllerStore,
        bind_host: str | None = None,
        placer: Placer | None = None,
        revision: float = 0.0,
    ) -> None:
        self._placer = placer
        self._in_force = InForce(config, revision)
        self._refused: str | None = None
        self._unplaced: tuple[str, ...] = ()
        self._placed_at = 0.0
        self._given_up: dict[str, Counts] = {}
        self._ceilings: dict[Role, int] = {}
        self._yielded_at = 0.0
        self._config = config
        self._parts = parts
        self._store = store
        self._wake = asyncio.Event()
        self._events: deque[tuple[int, str]] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        self._workforce = Workforce(config, parts, launcher, bind_host, self._wake.set, self._note)
        self._sizes = {Role.PREFILL: config.prefill.workers, Role.DECODE: config.decode.workers}
        self._scaler: PoolScaler | None = None
        self._routers: dict[RouterId, RouterLoad] = {}
        self._router_targets: dict[RouterId, Address] = {}
        self._metrics = ControllerMetrics(config)
        self._history = History()
        self._listed: list[WorkerEntry] = []
        self._version = 1
        self._has_changed = asyncio.Event()
        self._epoch = 0
        self._saved: dict[str, Any] = {}
        self._saved_revision: Hashable = None
        self._is_stopping = False
        self._saving = asyncio.Lock()
        self._is_in_office = asyncio.Event()
        self.is_fenced = False

    # What others ask.

    async def in_office(self) -> None:
        """Return once the workers of an earlier controller, if any, have been taken over."""
        await self._is_in_office.wait()

    def workers(self) -> list[WorkerEntry]:
        """Return the workers that may serve."""
        return self._workforce.listing()

    def health(self) -> tuple[bool, str]:
        return reconcile.health(self._workforce.observe())

    async def wait_for_change(self, known_version: int, limit_s: float) -> int:
        """Return the version of the list of workers once it is not `known_version`, or after
        `limit_s`."""
        if known_version == self._version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._has_changed.wait()
        return self._version

    def record(self, load: RouterLoad, target: Address | None = None) -> None:
        """Take in what a router has seen so far, and where its metrics are."""
        self._routers[load.router_id] = load
        if target is not None:
            self._router_targets[load.router_id] = target

    def targets(self, own: Address) -> list[dict[str, Any]]:
        """Return every process to scrape, as Prometheus's HTTP service discovery has it; `own`
        is where the controller's metrics are."""
        now, name = self.now(), self._config.cluster.name
        fresh = {k: t for k, t in self._router_targets.items() if now - t.at < ROUTER_TARGET_KEPT_S}
        self._router_targets = fresh
        return target_list(name, own, fresh.values(), self._workforce.exporters())

    def scale(self, sizes: Mapping[Role, int] | None) -> None:
        """Order sizes by hand, None to leave them to the load again."""
        if self._scaler is None:
            raise Unavailable("the controller has only just started: try again")
        if sizes is None:
            self._scaler.unpin()
        else:
            self._scaler.pin(sizes, "by hand")
            # A standby is to serve within a second: the order does not wait for the next sample.
            self._scaler.tick()

    def reconfigure(self, offered: InForce) -> TandemConfig:
        """Go by a configuration that was deployed later, if its workers are those there are.

        Return the one in force.
        """
        verdict = judge(self._in_force, offered, self._sizes)
        if self._scaler is None or verdict is None:
            return self._config
        self._in_force, self._refused = verdict.in_force, verdict.refused
        if verdict.note is not None:
            self._note(verdict.note)
        if verdict.sizes is not None:
            self._config = config = offered.config
            self._workforce.reconfigure(config)
            self._metrics.reconfigure(config)
            if self._placer is not None:
                self._placer.reconfigure(service_of(config, Counts(*config.autoscaler.ratio_pair)))
            self._scaler.reconfigure(config, verdict.sizes, "the deployed configuration says so")
            self._wake.set()
        return self._config

    def decisions(self, after: int, limit: int) -> list[dict[str, Any]]:
        return self._scaler.decisions(after, limit) if self._scaler else []

    def status(self) -> dict[str, Any]:
        """Return everything an operator wants to see, JSON-able."""
        observed = self._workforce.observe()
        is_healthy, reason = reconcile.health(observed)
        config, scaling = self._config, self._config.autoscaler
        return {
            "name": self._config.cluster.name,
            "model": self._config.model.name,
            "engine": self._config.model.engine,
            "healthy": is_healthy,
            "reason": reason,
            "failing": reconcile.is_failing(observed),
            "epoch": self._epoch,
            "autoscaler": self._config.autoscaler.mode,
            "desired": {role.value: n for role, n in self._sizes.items()},
            "pinned": self._scaler.pinned if self._scaler else None,
            "unwritten_decisions": self._scaler.num_unwritten if self._scaler else 0,
            "bounds": {
                "prefill": [scaling.min_prefill, scaling.max_prefill],
                "decode": [scaling.min_decode, scaling.max_decode],
            },
            "gpu_budget": scaling.gpu_budget,
            "gpus_per_worker": {
                "prefill": config.prefill.gpus_per_worker,
                "decode": config.decode.gpus_per_worker,
            },
            "workers": self._workforce.describe(),
            "unplaced": [*self._yields(), *self._unplaced],
            "refused": self._refused,
            "events": list(self._events),
            "failed_starts": {r.value: t.reason for r, t in observed.failed_starts.items()},
            "refused_pairs": {"->".join(p): why for p, why in refused_pairs(observed).items()},
            "failed_proofs": {"->".join(p): t.reason for p, t in observed.failed_proofs.items()},
        }

    def state(self) -> dict[str, Any]:
        """Return the status beside load, signal and latencies, JSON-able."""
        scaling = self._scaler.view() if self._scaler else None
        recent = self._history.recent()
        return state_document(self.status(), self.load(), scaling, recent)

    def history(self, after: int) -> dict[str, Any]:
        """Return the samples later than Unix second `after`, JSON-able."""
        return self._history.document(after)

    def _note(self, event: str) -> None:
        logger.info("%s", event)
        self._num_events += 1
        self._events.append((self._num_events, event))

    # What the autoscaler asks (`cluster.pools.Pools`).

    def now(self) -> float:
        return time.time()

    def load(self) -> ClusterLoad:
        now = self.now()
        fresh = {k: r for k, r in self._routers.items() if now - r.at < _ROUTER_KEPT_S}
        self._routers = fresh
        return ClusterLoad(now, tuple(self._workforce.loads(now)), tuple(fresh.values()))

    def resize(self, sizes: Mapping[Role, int], reason: str) -> None:
        if dict(sizes) != self._sizes:
            self._sizes = dict(sizes)
            wanted = f"{sizes[Role.PREFILL]} prefill, {sizes[Role.DECODE]} decode"
            self._note(f"pools go to {wanted}: {reason}")
            self._wake.set()

    # The loop.

    async def run(self) -> None:
        """Reconcile until stopped or fenced: on every change, and at least twice a second."""
        await self._take_office()
        assert self._scaler is not None
        scaling = asyncio.create_task(self._scaler.run())
        try:
            while not self._is_stopping:
                self._heed_clock()
                self._workforce.drop_silent()
                await self._workforce.renew_links()
                if scaling.done():
                    scaling.result()
                async with self._saving:
                    await self._save()
                if self.is_fenced:
                    break
                await self._act()
                self._announce()
                self._show()
                self._sample()
                await self._pause()
        finally:
            scaling.cancel()
            await asyncio.gather(scaling, return_exceptions=True)
        if self.is_fenced:
            logger.warning("a later controller has taken over from epoch %d", self._epoch)
            await self._workforce.let_go()

    def _heed_clock(self) -> None:
        """A clock that was set back leaves stamps in the future: what waits on them would wait
        until it has caught up."""
        now = self.now()
        self._placed_at, self._yielded_at = min(self._placed_at, now), min(self._yielded_at, now)
        self._workforce.heed_clock(now)

    def _announce(self) -> None:
        """Let routers that follow know if the list has changed."""
        if (listed := self.workers()) != self._listed:
            self._listed = listed
            self._version += 1
            self._has_changed.set()
            self._has_changed = asyncio.Event()

    def _show(self) -> None:
        """Export where things stand, at every turn of the loop."""
        assert self._scaler is not None
        self._metrics.show(self._workforce.observe(), self._sizes, self._scaler, self.now())
        self._metrics.show_surroundings(self._epoch, len(self._routers), len(self._unplaced))

    def _sample(self) -> None:
        if self._scaler is not None and self._history.is_due(self.now()):
            load = self.load()
            seen = scales(load, self._sizes, self._scaler.view())
            self._history.add(load.at, load.routers, seen)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(TICK_S):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            self._wake.clear()

    async def _take_office(self) -> None:
        """Claim an epoch and go on from what the controller before wrote down."""
        self._epoch = await asyncio.to_thread(self._store.claim_epoch)
        for name in ("config", "sizes", "workforce"):
            self._saved[name] = await asyncio.to_thread(self._store.load, name)
        decided = await asyncio.to_thread(self._store.load, "autoscaler")
        if self._saved["sizes"] is not None:
            self._sizes = {role: self._saved["sizes"][role.value] for role in Role}
        await self._workforce.adopt(self._epoch, self._saved["workforce"])
        scaler: Any = load(self._parts.autoscaler)
        pools: Pools = self
        self._scaler = scaler(self._config, pools, decided)
        self._is_in_office.set()

    async def _save(self) -> None:
        """Write down what has changed, unless a later controller does so by now."""
        if self._is_stopping:
            return
        assert self._scaler is not None
        self.is_fenced = await asyncio.to_thread(self._store.latest_epoch) > self._epoch
        if self.is_fenced:
            return
        # Decisions first: sizes without the decision behind them would be taken back or repeated.
        if (revision := self._scaler.revision) != self._saved_revision:
            await asyncio.to_thread(self._store.save, "autoscaler", self._scaler.document())
            self._saved_revision = revision
        notes = {
            "sizes": {role.value: n for role, n in self._sizes.items()},
            "workforce": self._workforce.as_document(),
            # Last: routers offer it again as long as it has not been written down.
            "config": self._in_force.as_document(),
        }
        for name, document in notes.items():
            if document != self._saved[name]:
                await asyncio.to_thread(self._store.save, name, document)
                self._saved[name] = document

    async def _act(self) -> None:
        if self._is_stopping:
            return
        actions = reconcile.decide(self._desired(), self._workforce.observe(), self.now())
        for action in actions:
            logger.debug("%s", action)
            match action:
                case ProveHandoff(pair):
                    self._workforce.prove(pair)
                case Enter(worker_id, state, reason):
                    self._workforce.enter(worker_id, state, reason)
                    self._wake.set()
                case TakeRole(worker_id, role, reason):
                    self._workforce.change_role(worker_id, role, reason)
                case StopWorker(worker_id, reason, is_failure):
                    self._workforce.stop(worker_id, reason, is_failure)
        await self._start_workers([a for a in actions if isinstance(a, StartWorker)])

    async def _start_workers(self, starts: list[StartWorker]) -> None:
        """Start workers where the placement cycle puts them; who finds no room waits."""
        if self._placer is None:
            for start in starts:
                self._workforce.start(start.role, start.is_spare, None)
            return
        if not starts and self.now() - self._placed_at < PLACEMENT_PERIOD_S:
            return
        self._placed_at = self.now()
        wanted = Counts.count(start.role for start in starts)
        workers = self._workforce.placed()
        orders = await asyncio.to_thread(self._placer.plan, workers, wanted, self._placed_at)
        self._workforce.locate(orders.domains, orders.values)
        self._give_up(orders)
        for worker_id in orders.stranded:
            self._workforce.give_up_claim(worker_id, "the node it was to start on is gone")
        if orders.unplaced != self._unplaced:
            self._unplaced = orders.unplaced
            for reason in orders.unplaced:
                self._note(f"no place: {reason}")
        if self._is_stopping:
            return
        # Pools come before spares.
        waiting = sorted(starts, key=lambda start: start.is_spare)
        for slot in orders.slots:
            start = next(each for each in waiting if each.role is slot.role)
            waiting.remove(start)
            self._workforce.start(start.role, start.is_spare, slot.node_id)
        if orders.slots or orders.victims or orders.stranded:
            # `plan` has written down the rest.
            left = Counts.count(start.role for start in waiting)
            await asyncio.to_thread(self._placer.record, self._workforce.placed(), left, self.now())

    def _give_up(self, orders: Orders) -> None:
        """Let workers go that a service of higher priority needs the room of, for a while."""
        if self.now() - self._yielded_at > YIELD_S:
            self._given_up, self._ceilings = {}, {}
        sizes = self._allowed_sizes()
        if orders.is_pressed:
            self._workforce.end_observation("a deployment of higher priority waits for the room")
        for worker_id, reason in orders.victims:
            role = self._workforce.give_up(worker_id, reason)
            if role is None:
                continue
            self._ceilings[role] = sizes[role] = max(0, sizes[role] - 1)
            self._given_up[reason] = self._given_up.get(reason, Counts()) + Counts.one(role)
            self._yielded_at = self.now()

    def _allowed_sizes(self) -> dict[Role, int]:
        return {role: min(n, self._ceilings.get(role, n)) for role, n in self._sizes.items()}

    def _yields(self) -> list[str]:
        """Return why the pools are kept below their sizes, if they are."""
        if self._allowed_sizes() == self._sizes:
            return []
        return [f"{size} given up: {reason}" for reason, size in self._given_up.items()]

    def _desired(self) -> Desired:
        cluster, autoscaler = self._config.cluster, self._config.autoscaler
        return Desired(
            self._allowed_sizes(),
            cluster.warmup,
            cluster.standby,
            autoscaler.scaled(autoscaler.soft_in_s),
            self._config.router.request_deadline_s,
            autoscaler.gate_tolerance,
            self._config.prefill.has_same_engine(self._config.decode),
        )

    async def drain_and_stop(self) -> None:
        """Take every worker off the list, stop them all, and end the loop."""
        self._is_stopping = True
        self._wake.set()
        await self._workforce.stop_all()
        if self._placer is not None:
            await asyncio.to_thread(self._placer.withdraw)
        async with self._saving:  # a note written after this would outlive the deployment
            await asyncio.to_thread(self._store.clear)
