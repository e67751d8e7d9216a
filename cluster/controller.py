"""The controller: keeps both pools at their size and knows which workers may serve.

It executes what `reconcile.decide` returns and holds no policy of its own. It runs without
Ray: `WorkerHandle` is how it reaches a worker's process, `cluster/ray_plane.py` provides it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import zmq.asyncio

from cluster import reconcile
from cluster.config import TandemConfig
from cluster.cores import choose_cores
from cluster.errors import HandoffFailed
from cluster.names import Role, RouterId, WorkerId
from cluster.reconcile import Desired, Observed, ObservedWorker, Pair, Trouble, WorkerState
from cluster.request_plane import WorkerLink
from cluster.snapshot import WorkerEntry
from cluster.warmup import prove_handoff, warmup_prompt
from cluster.worker_spec import Parts, Seat, WorkerSpec

TICK_S = 0.5
STOP_TIMEOUT_S = 4.0
MAX_EVENTS = 200

logger = logging.getLogger(__name__)


class WorkerHandle(Protocol):
    """A worker's process, wherever it runs."""

    async def seat(self) -> Seat: ...

    async def start(self, spec: WorkerSpec) -> WorkerEntry: ...

    async def wait(self) -> None:
        """Return or raise when the process is gone."""

    async def stop(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class _Member:
    """One worker and what the controller knows of it."""

    worker_id: WorkerId
    role: Role
    handle: WorkerHandle
    asked_at: float
    state: WorkerState = WorkerState.PENDING
    seat: Seat | None = None
    cpus: tuple[int, ...] = ()
    entry: WorkerEntry | None = None
    link: WorkerLink | None = None
    start_s: float | None = None


@dataclass(slots=True)
class _History:
    """What `reconcile` needs to remember between ticks."""

    proven: set[Pair] = field(default_factory=set)
    testing: set[Pair] = field(default_factory=set)
    failed_proofs: dict[Pair, Trouble] = field(default_factory=dict)
    failed_starts: dict[Role, Trouble] = field(default_factory=dict)

    def forget(self, worker_id: WorkerId) -> None:
        self.proven = {pair for pair in self.proven if worker_id not in pair}
        for pair in [pair for pair in self.failed_proofs if worker_id in pair]:
            del self.failed_proofs[pair]


class Controller:
    """Owns the workers of one deployment. `launch` asks for a worker's process.

    Workers listen on `bind_host`, or each on its node's address if that is None.
    """

    def __init__(
        self,
        config: TandemConfig,
        parts: Parts,
        launch: Callable[[WorkerId, Role], WorkerHandle],
        bind_host: str | None = None,
    ) -> None:
        self._config = config
        self._parts = parts
        self._launch = launch
        self._bind_host = bind_host
        self._members: dict[WorkerId, _Member] = {}
        self._history = _History()
        self._desired = Desired(
            {Role.PREFILL: config.prefill.workers, Role.DECODE: config.decode.workers},
            config.cluster.warmup,
        )
        self._last_number = dict.fromkeys(Role, 0)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = zmq.asyncio.Context()
        self._is_stopping = False
        self._events: deque[tuple[int, str]] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0

    # What others ask.

    def workers(self) -> list[WorkerEntry]:
        """Return the workers that may serve."""
        return [
            m.entry
            for m in self._members.values()
            if m.state is WorkerState.READY and m.entry is not None
        ]

    def health(self) -> tuple[bool, str]:
        return reconcile.health(self._observe())

    def status(self) -> dict[str, Any]:
        """Return everything an operator wants to see, JSON-able."""
        observed = self._observe()
        is_healthy, reason = reconcile.health(observed)
        return {
            "name": self._config.cluster.name,
            "model": self._config.model.name,
            "engine": self._config.model.engine,
            "healthy": is_healthy,
            "reason": reason,
            "failing": reconcile.is_failing(observed),
            "desired": {role.value: n for role, n in self._desired.workers.items()},
            "workers": [_describe(member) for member in self._members.values()],
            "events": list(self._events),
            "failed_starts": {r.value: t.reason for r, t in observed.failed_starts.items()},
            "failed_proofs": {"->".join(p): t.reason for p, t in observed.failed_proofs.items()},
        }

    def _note(self, event: str) -> None:
        logger.info("%s", event)
        self._num_events += 1
        self._events.append((self._num_events, event))

    # The loop.

    async def run(self) -> None:
        """Reconcile until stopped: on every change, and at least twice a second."""
        while not self._is_stopping:
            self._drop_silent()
            self._act()
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            finally:
                self._wake.clear()

    async def drain_and_stop(self) -> None:
        """Take every worker off the list, stop them all, and end the loop."""
        self._is_stopping = True
        self._wake.set()
        for member in self._members.values():
            member.state = WorkerState.STOPPING
        await asyncio.gather(*(self._stop(m) for m in list(self._members.values())))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    def _observe(self) -> Observed:
        history = self._history
        return Observed(
            tuple(ObservedWorker(m.worker_id, m.role, m.state) for m in self._members.values()),
            frozenset(history.proven),
            frozenset(history.testing),
            dict(history.failed_proofs),
            dict(history.failed_starts),
        )

    def _act(self) -> None:
        if self._is_stopping:
            return
        for action in reconcile.decide(self._desired, self._observe(), time.monotonic()):
            logger.debug("%s", action)
            match action:
                case reconcile.StartWorker(role):
                    self._start(role)
                case reconcile.ProveHandoff(pair):
                    self._history.testing.add(pair)
                    self._spawn(self._prove(*(self._members[w] for w in pair)))
                case reconcile.ListWorker(worker_id):
                    self._list(self._members[worker_id])
                case reconcile.StopWorker(worker_id, reason, is_failure):
                    member = self._members[worker_id]
                    self._note(f"{worker_id} is stopped: {reason}")
                    if is_failure:
                        self._count_failure(member.role, reason)
                    member.state = WorkerState.STOPPING
                    self._spawn(self._stop(member))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()):
            logger.error("controller task failed", exc_info=error)

    # Starting a worker.

    def _start(self, role: Role) -> None:
        self._last_number[role] += 1
        worker_id = WorkerId(f"{role}-{self._last_number[role]}")
        member = _Member(worker_id, role, self._launch(worker_id, role), time.monotonic())
        self._members[worker_id] = member
        self._spawn(self._bring_up(member))

    async def _bring_up(self, member: _Member) -> None:
        limit_s = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._load(member)
        except TimeoutError:
            doing = "waiting for a node with room" if member.seat is None else "starting"
            await self._fail(member, f"still {doing} after {limit_s:.0f} s")
        except Exception as error:
            # Whatever the process or its engine raised: it is the reason the operator sees.
            await self._fail(member, summarise(error))
        else:
            self._spawn(self._watch(member))

    async def _load(self, member: _Member) -> None:
        member.seat = await member.handle.seat()
        member.cpus = self._choose_cores(member, member.seat)
        member.state = WorkerState.STARTING
        cores = ",".join(map(str, member.cpus))
        self._note(f"{member.worker_id} starts, engine pinned to core(s) {cores}")
        entry = await member.handle.start(self._specify(member, member.seat))
        member.entry = replace(entry, node=member.seat.node)
        member.link = WorkerLink(
            self._context,
            RouterId(f"{self._config.cluster.name}-controller"),
            member.worker_id,
            member.entry.endpoint,
            self._config.router.worker_timeout_s,
        )
        member.start_s = time.monotonic() - member.asked_at
        member.state = WorkerState.WARMING

    def _choose_cores(self, member: _Member, seat: Seat) -> tuple[int, ...]:
        """Nodes of one machine share its cores, so it is the machine that counts."""
        others = [m.cpus for m in self._members.values() if m.seat and m.seat.host == seat.host]
        return choose_cores(seat.cores, others, self._pool(member.role).cpus_per_worker)

    def _pool(self, role: Role) -> Any:
        return self._config.prefill if role is Role.PREFILL else self._config.decode

    def _specify(self, member: _Member, seat: Seat) -> WorkerSpec:
        host = self._bind_host or seat.address
        return WorkerSpec(
            member.worker_id,
            member.role,
            self._parts.engine,
            self._parts.roles,
            _listening_on(self._config, host),
            member.cpus,
            host,
        )

    async def _prove(self, prefill: _Member, decode: _Member) -> None:
        history = self._history
        pair = (prefill.worker_id, decode.worker_id)
        earlier = history.failed_proofs.get(pair)
        attempt = earlier.failures if earlier else 0
        prompt = warmup_prompt(self._config.model, pair, attempt)
        assert prefill.link is not None and decode.link is not None
        try:
            await prove_handoff(prefill.link, decode.link, prompt, str(attempt))
        except HandoffFailed as error:
            self._note(f"warm-up hand-off failed: {error}")
            if set(pair) <= set(self._members):
                trouble = Trouble(attempt + 1, time.monotonic(), str(error))
                history.failed_proofs[pair] = trouble
        else:
            history.proven.add(pair)
            history.failed_proofs.pop(pair, None)
        finally:
            history.testing.discard(pair)

    def _list(self, member: _Member) -> None:
        member.state = WorkerState.READY
        self._note(f"{member.worker_id} serves after {time.monotonic() - member.asked_at:.1f} s")
        self._history.failed_starts.pop(member.role, None)

    # Losing a worker.

    async def _watch(self, member: _Member) -> None:
        """Notice the end of the worker's process."""
        reason = "its process ended"
        try:
            await member.handle.wait()
        except Exception as error:
            reason = summarise(error)
        if member.state is not WorkerState.STOPPING:
            await self._fail(member, reason)

    def _drop_silent(self) -> None:
        for member in list(self._members.values()):
            is_up = member.state in (WorkerState.WARMING, WorkerState.READY)
            if is_up and member.link is not None and member.link.is_lost:
                member.state = WorkerState.STOPPING
                self._spawn(self._fail(member, "it stopped answering heartbeats"))

    async def _fail(self, member: _Member, reason: str) -> None:
        self._note(f"{member.worker_id} failed: {reason}")
        self._count_failure(member.role, f"{member.worker_id}: {reason}")
        member.state = WorkerState.STOPPING
        member.handle.kill()
        await self._forget(member)

    def _count_failure(self, role: Role, reason: str) -> None:
        earlier = self._history.failed_starts.get(role)
        failures = earlier.failures + 1 if earlier else 1
        self._history.failed_starts[role] = Trouble(failures, time.monotonic(), reason)

    async def _stop(self, member: _Member) -> None:
        await _within(STOP_TIMEOUT_S, member.handle.stop())
        member.handle.kill()
        await self._forget(member)

    async def _forget(self, member: _Member) -> None:
        if self._members.pop(member.worker_id, None) is None:
            return
        self._history.forget(member.worker_id)
        if member.link is not None:
            await member.link.close()


def _listening_on(config: TandemConfig, host: str) -> TandemConfig:
    """Return `config` with the KV plane on `host`, unless the operator chose an address."""
    if "bind_host" in config.handoff.model_fields_set:
        return config
    return config.model_copy(
        update={"handoff": config.handoff.model_copy(update={"bind_host": host})}
    )


async def _within(limit_s: float, work: Awaitable[None]) -> None:
    """Await `work`, at most `limit_s`; a worker that cannot stop by itself is killed after."""
    try:
        async with asyncio.timeout(limit_s):
            await work
    except Exception as error:
        logger.info("worker did not stop by itself: %s", summarise(error))


def summarise(error: BaseException) -> str:
    """Return the one line that tells what went wrong, without a remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return summarise(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe(member: _Member) -> dict[str, Any]:
    snapshot = member.link.snapshot if member.link else None
    return {
        "worker_id": member.worker_id,
        "role": member.role.value,
        "state": member.state.value,
        "node": member.seat.node if member.seat else None,
        "pid": member.seat.pid if member.seat else None,
        "cpus": list(member.cpus),
        "endpoint": member.entry.endpoint if member.entry else None,
        "start_s": member.start_s,
        "num_running": snapshot.num_running if snapshot else None,
        "num_free_blocks": snapshot.num_free_blocks if snapshot else None,
        "num_held_blocks": snapshot.num_held_blocks if snapshot else None,
    }
