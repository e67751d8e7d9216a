"""The workers of one deployment, and everything about them that takes time.

Starting, taking over, proving, flipping and stopping run as tasks; each ends by changing a
member's state and calling `on_change`. What to do is decided elsewhere (`cluster/reconcile.py`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import zmq.asyncio

from cluster.config import TandemConfig
from cluster.cores import choose_cores
from cluster.errors import Fenced, HandoffFailed, summarise
from cluster.link_renewal import LinkRenewal
from cluster.load import WorkerLoad
from cluster.members import History, Launcher, Member, unpaired
from cluster.messages import ChangeRole
from cluster.metrics import WORKER_FAILURES
from cluster.names import Role, RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.service import PlacedWorker
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets
from cluster.warmup import prove_handoff, warmup_prompt
from cluster.worker_spec import Parts, Seat, WorkerSpec, listening_on
from cluster.worker_state import (
    PROVISIONED,
    Observed,
    ObservedWorker,
    Pair,
    Trouble,
    WorkerState,
)

STOP_TIMEOUT_S = 4.0
_ADOPTION_S = 5.0
_UP = frozenset(WorkerState) - {WorkerState.PENDING, WorkerState.STARTING, WorkerState.STOPPING}

logger = logging.getLogger(__name__)


class Workforce:
    """Members by worker id. `note` gets a line per event an operator wants to see."""

    def __init__(
        self,
        config: TandemConfig,
        parts: Parts,
        launcher: Launcher,
        bind_host: str | None,
        on_change: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._parts = parts
        self._launcher = launcher
        self._bind_host = bind_host
        self._on_change = on_change
        self._note = note
        self._epoch = 0
        self._members: dict[WorkerId, Member] = {}
        self._history = History()
        self._last_number = dict.fromkeys(Role, 0)
        self._domains: Mapping[str, str] = {}
        self._node_values: Mapping[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = zmq.asyncio.Context()
        self._sockets = Sockets(self._context, launcher.keys)
        self._renewal = LinkRenewal(self._sockets)

    # What others see.

    def observe(self) -> Observed:
        history = self._history
        return Observed(
            tuple(self._observe(member) for member in self._members.values()),
            frozenset(history.proven),
            frozenset(history.testing),
            dict(history.failed_proofs),
            dict(history.failed_starts),
        )

    def _observe(self, member: Member) -> ObservedWorker:
        node = member.seat.node if member.seat else ""
        return replace(member.observe(), value=self._node_values.get(node, 0))

    def locate(self, domains: Mapping[str, str], values: Mapping[str, int]) -> None:
        """Take in each node's network domain, for routers, and its worth, for choosing victims."""
        self._domains, self._node_values = domains, values

    def listing(self) -> list[WorkerEntry]:
        """Return the workers that routers may use."""
        entries = (member.listing() for member in self._members.values())
        return [
            replace(entry, domain=self._domains.get(entry.node, "")) for entry in entries if entry
        ]

    def loads(self, now: float) -> list[WorkerLoad]:
        loop_s = asyncio.get_running_loop().time()
        return [member.load(now, loop_s) for member in self._members.values()]

    def exporters(self) -> list[WorkerEntry]:
        """Return every worker that is up, listed or not, under the role it has now."""
        up = (member for member in self._members.values() if member.state in _UP)
        return [replace(each.entry, role=each.role) for each in up if each.entry]

    def placed(self) -> list[PlacedWorker]:
        """Return where workers are, as placement sees it."""
        placed = (member.placed() for member in self._members.values())
        return [worker for worker in placed if worker is not None]

    def describe(self) -> list[dict[str, Any]]:
        described = [member.describe() for member in self._members.values()]
        return [{**each, "domain": self._domains.get(each["node"] or "", "")} for each in described]

    def as_document(self) -> dict[str, Any]:
        return {
            "members": [member.as_document() for member in self._members.values()],
            "last_number": {role.value: n for role, n in self._last_number.items()},
        }

    def reconfigure(self, config: TandemConfig) -> None:
        """Go by `config` with what is started or connected from now on."""
        self._config = config

    # Taking over.

    async def adopt(self, epoch: int, document: Mapping[str, Any] | None) -> None:
        """Act under `epoch` from now on, with the workers an earlier controller left.

        Returns when those that were up have answered, or have had their time to: until then
        nobody may be told that they are gone.
        """
        self._epoch = epoch
        if document is None:
            return
        self._last_number = {role: document["last_number"][role.value] for role in Role}
        answering: list[asyncio.Task[None]] = []
        for saved in document["members"]:
            worker_id = WorkerId(saved["worker_id"])
            handle = self._launcher.attach(worker_id)
            if handle is None:
                self._note(f"{worker_id} has gone while no controller ran")
                continue
            member = Member.from_document(saved, handle)
            self._members[worker_id] = member
            if member.state is WorkerState.STOPPING:
                self._spawn(self._stop(member))
                continue
            member.work = self._spawn(self._bring_up(member, self._take_over(member)))
            if member.state in _UP:
                answering.append(member.work)
        if answering:
            await asyncio.wait(answering, timeout=_ADOPTION_S)

    async def _take_over(self, member: Member) -> None:
        entry = await member.handle.adopt(self._epoch)
        if entry is None:
            await self._load(member)
            return
        was_up = member.state in _UP
        member.seat = member.seat or await member.handle.seat()
        self._connect(member, entry)
        # The notes may be older than the last order; this also teaches the worker our epoch.
        self._tell_role(member)
        if not was_up:
            member.enter(WorkerState.WARMING, time.time())
        self._note(f"{member.worker_id} is taken over, {member.state}")

    # Starting.

    def start(self, role: Role, is_spare: bool, node_id: str | None) -> None:
        """Ask for a worker's process, on a node if one is given, and make it warm."""
        self._last_number[role] += 1
        worker_id = WorkerId(f"{role}-{self._last_number[role]}")
        now = time.time()
        try:
            handle = self._launcher.launch(worker_id, role, node_id)
        except Exception as error:
            # One of this name was launched just before a crash, and nobody noted it.
            if (left := self._launcher.attach(worker_id)) is not None:
                left.kill()
            self._history.count_failure(role, f"{worker_id}: {summarise(error)}", now)
            return
        member = Member(worker_id, role, handle, now, now, node_id=node_id, is_spare=is_spare)
        self._members[worker_id] = member
        member.work = self._spawn(self._bring_up(member, self._load(member)))

    async def _bring_up(self, member: Member, work: Coroutine[Any, Any, None]) -> None:
        limit_s = self._config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await work
        except TimeoutError:
            doing = "waiting for a node with room" if member.seat is None else "starting"
            self._fail(member, f"still {doing} after {limit_s:.0f} s")
        except Fenced:
            # A later controller's by now: not ours to kill.
            await self._forget(member)
        except Exception as error:
            # Whatever the process or its engine raised: it is the reason the operator sees.
            self._fail(member, summarise(error))
        else:
            self._spawn(self._watch(member))

    async def _load(self, member: Member) -> None:
        member.seat = await member.handle.seat()
        member.cpus = self._choose_cores(member, member.seat)
        member.enter(WorkerState.STARTING, time.time())
        self._on_change()
        cores = ",".join(map(str, member.cpus))
        self._note(f"{member.worker_id} starts, engine pinned to core(s) {cores}")
        spec = self._specify(member, member.seat)
        self._connect(member, await member.handle.start(spec, self._epoch))
        member.start_s = time.time() - member.asked_at
        member.enter(WorkerState.WARMING, time.time())

    def _connect(self, member: Member, entry: WorkerEntry) -> None:
        assert member.seat is not None
        member.entry = replace(entry, node=member.seat.node)
        if (why := unpaired(member, self._members.values())) is not None:
            self._note(why)
        member.link = WorkerLink(
            self._sockets,
            RouterId(f"{self._config.cluster.name}-controller-{self._epoch}"),
            member.worker_id,
            entry.endpoint,
            self._config.router.worker_timeout_s,
            self._on_change,
        )

    def _choose_cores(self, member: Member, seat: Seat) -> tuple[int, ...]:
        """Nodes of one machine share its cores, so it is the machine that counts."""
        others = [m.cpus for m in self._members.values() if m.seat and m.seat.host == seat.host]
        return choose_cores(seat.cores, others, self._config.pool(member.role).cpus_per_worker)

    def _specify(self, member: Member, seat: Seat) -> WorkerSpec:
        host = self._bind_host or seat.address
        return WorkerSpec(
            member.worker_id,
            member.role,
            self._parts.engine,
            self._parts.roles,
            listening_on(self._config, host),
            member.cpus,
            host,
            self._config.security.curve_keys,
        )

    # Once it is up.

    def prove(self, pair: Pair) -> None:
        if any(self._members[worker_id].link is None for worker_id in pair):
            return  # not taken over yet: decided again at the next tick
        self._history.testing.add(pair)
        self._spawn(self._prove(*(self._members[worker_id] for worker_id in pair)))

    async def _prove(self, prefill: Member, decode: Member) -> None:
        history = self._history
        pair = (prefill.worker_id, decode.worker_id)
        earlier = history.failed_proofs.get(pair)
        attempt = earlier.failures if earlier else 0
        salt = f"{self._epoch}.{attempt}"
        prompt = warmup_prompt(self._config.model, pair, salt)
        assert prefill.link is not None and decode.link is not None
        try:
            await prove_handoff(prefill.link, decode.link, prompt, salt)
        except HandoffFailed as error:
            self._note(f"warm-up hand-off failed: {error}")
            if set(pair) <= set(self._members):
                history.failed_proofs[pair] = Trouble(attempt + 1, time.time(), str(error))
        else:
            history.proven.add(pair)
            history.failed_proofs.pop(pair, None)
        finally:
            history.testing.discard(pair)

    def enter(self, worker_id: WorkerId, state: WorkerState, reason: str) -> None:
        """Put a worker into a state that only changes who may use it."""
        member = self._members[worker_id]
        is_new = member.state in (WorkerState.WARMING, WorkerState.HELD)
        member.enter(state, time.time())
        if is_new and state is WorkerState.READY:
            self._note(f"{worker_id} serves after {time.time() - member.asked_at:.1f} s")
            self._history.failed_starts.pop(member.role, None)
        elif state is not WorkerState.READY or not is_new:
            self._note(f"{worker_id} is {state}: {reason}")

    def change_role(self, worker_id: WorkerId, role: Role, reason: str) -> None:
        """Have the worker serve in `role` as soon as it has nothing open in its present one."""
        member = self._members[worker_id]
        member.role, member.is_spare = role, False
        member.enter(WorkerState.FLIPPING, time.time())
        self._tell_role(member)
        self._note(f"{worker_id} becomes a {role} worker: {reason}")

    def _tell_role(self, member: Member) -> None:
        """Order the role that is on record; one that is told so already changes nothing."""
        if member.link is not None:  # else it is told when it is taken over
            member.link.send(ChangeRole(member.role, self._epoch))

    def give_up(self, worker_id: WorkerId, reason: str) -> Role | None:
        """Let a worker go without an observation period; return its role, None if it has gone
        since that was decided or was in no pool."""
        member = self._members.get(worker_id)
        if member is None or member.state is WorkerState.STOPPING:
            return None
        counts = member.state in PROVISIONED and not member.is_spare
        if member.state in _UP:
            self.enter(worker_id, WorkerState.DRAINING, reason)
        else:
            self.stop(worker_id, reason, is_failure=False)
        return member.role if counts else None

    def end_observation(self, reason: str) -> None:
        """Have the workers that were taken out drain at once."""
        for member in self._members.values():
            if member.state is WorkerState.SOFT_OUT:
                self.enter(member.worker_id, WorkerState.DRAINING, reason)

    def give_up_claim(self, worker_id: WorkerId, reason: str) -> None:
        """Stop a worker that waits for its node, unless that was done already."""
        member = self._members.get(worker_id)
        if member is not None and member.state is WorkerState.PENDING:
            self.stop(worker_id, reason, is_failure=False)

    def heed_clock(self, now: float) -> None:
        """Leave no stamp that lies in the future."""
        for member in self._members.values():
            member.since = min(member.since, now)
        self._history.heed_clock(now)

    # Losing a worker.

    async def _watch(self, member: Member) -> None:
        """Notice the end of the worker's process."""
        reason = "its process ended"
        try:
            await member.handle.wait()
        except Exception as error:
            reason = summarise(error)
        if member.state is not WorkerState.STOPPING:
            self._fail(member, reason)

    def drop_silent(self) -> None:
        """Give up workers that answer no more; tell those that change role once more: the
        connection may have broken after the order was written to it."""
        for member in list(self._members.values()):
            if member.state in _UP and member.link is not None and member.link.is_lost:
                self._fail(member, "it stopped answering heartbeats")
            elif member.state is WorkerState.FLIPPING:
                self._tell_role(member)

    async def renew_links(self) -> None:
        """Have the links go by the keys in use."""
        for member in self._members.values():
            member.link = member.link and self._renewal.turn(member.link)
        await self._renewal.close_drained()

    def _fail(self, member: Member, reason: str) -> None:
        self._note(f"{member.worker_id} failed: {reason}")
        WORKER_FAILURES.labels(member.role.value).inc()
        if member.is_new(time.time()):
            why = f"{member.worker_id}: {reason}"
            self._history.count_failure(member.role, why, time.time())
        member.enter(WorkerState.STOPPING, time.time())
        member.handle.kill()
        self._spawn(self._forget(member))

    def stop(self, worker_id: WorkerId, reason: str, is_failure: bool) -> None:
        member = self._members[worker_id]
        self._note(f"{worker_id} is stopped: {reason}")
        if is_failure:
            WORKER_FAILURES.labels(member.role.value).inc()
            self._history.count_failure(member.role, reason, time.time())
        member.enter(WorkerState.STOPPING, time.time())
        self._spawn(self._stop(member))

    async def _stop(self, member: Member) -> None:
        if member.work is not None:
            # Its end would look like a failure, and its success would bring it back.
            member.work.cancel()
        if await _within(STOP_TIMEOUT_S, member.handle.stop(self._epoch)):
            member.handle.kill()
        await self._forget(member)

    async def _forget(self, member: Member) -> None:
        if self._members.pop(member.worker_id, None) is None:
            return
        self._history.forget(member.worker_id)
        if member.link is not None:
            await self._renewal.end(member.link)

    async def stop_all(self) -> None:
        for member in self._members.values():
            member.enter(WorkerState.STOPPING, time.time())
        await asyncio.gather(*(self._stop(m) for m in list(self._members.values())))
        await self.let_go()

    async def let_go(self) -> None:
        """End every task and link, leaving the workers as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self._members.values():
            if member.link is not None:
                await member.link.close()
        await self._renewal.close()
        self._members.clear()
        self._context.destroy(linger=0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._on_change()
        if not task.cancelled() and (error := task.exception()):
            logger.error("controller task failed", exc_info=error)


async def _within(limit_s: float, work: Awaitable[None]) -> bool:
    """Await `work`, at most `limit_s`; return whether the worker may be killed after: it may
    not if a later controller owns it."""
    try:
        async with asyncio.timeout(limit_s):
            await work
    except Fenced:
        return False
    except Exception as error:
        logger.info("worker did not stop by itself: %s", summarise(error))
    return True
