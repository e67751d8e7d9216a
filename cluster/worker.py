"""One worker: an engine, a role, and the request plane between them. Runs without Ray.

The role decides what a message or an engine output means; this shell moves bytes, keeps the
table of who asked for what, counts its work, changes the role when it is told to and idle, and
notices routers that fall silent.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq.asyncio

from cluster.engine import Engine, EngineFacts, EngineOutput
from cluster.errors import RequestInvalid
from cluster.exporter import Exporter
from cluster.messages import (
    Cancel,
    ChangeRole,
    Decode,
    Failed,
    Heartbeat,
    Prefill,
    Rejected,
    RouterMessage,
    WorkerMessage,
    WorkerSnapshot,
)
from cluster.metrics import BUSY_SECONDS
from cluster.names import Component, RequestId, Role
from cluster.request_plane import WorkerSocket
from cluster.ring_file import key_source
from cluster.roles import WorkerRole
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets
from cluster.stages import without_times
from cluster.worker_metrics import WorkerMetrics
from cluster.worker_spec import WorkerSpec, load

_WATCH_S = 0.5
# A router that stands still while its connection is up most likely goes on: ending its streams
# would cost its clients more than waiting costs anybody.
_PATIENCE = 3

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """One router: when it last spoke, and what it has here."""

    last_seen: float
    request_ids: set[RequestId] = field(default_factory=set)


@dataclass(slots=True)
class _Work:
    """What this life of the engine has done so far; `busy_since` while a request is open."""

    generated_tokens: int = 0
    computed_prompt_tokens: int = 0
    busy_s: float = 0.0
    busy_since: float | None = None

    def count(self, role: Role, output: EngineOutput) -> None:
        if role is Role.DECODE:
            self.generated_tokens += len(output.token_ids)
        elif output.stats is not None:
            self.computed_prompt_tokens += output.stats.num_computed_tokens

    def set_busy(self, is_busy: bool, now: float) -> None:
        if self.busy_since is not None:
            self.busy_s += now - self.busy_since
            BUSY_SECONDS.inc(now - self.busy_since)
        self.busy_since = now if is_busy else None


class Worker:
    """Serves one engine until stopped or until the engine dies, in one role at a time."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._role_name = spec.role
        self._roles: dict[Role, WorkerRole] = {r: load(path)() for r, path in spec.roles.items()}
        self._next_role: Role | None = None
        self._controller_epoch = 0
        self._work = _Work()
        self._metrics = WorkerMetrics(spec.config.handoff)
        self._engine: Engine = load(spec.engine)(spec)
        self._peers: dict[bytes, _Peer] = {}
        self._owners: dict[RequestId, bytes] = {}
        self._stopping = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Worker {self._spec.worker_id} {self._role_name} requests={len(self._owners)}>"

    @property
    def _role(self) -> WorkerRole:
        return self._roles[self._role_name]

    async def start(self) -> WorkerEntry:
        """Start the engine and listen; raise what made the engine fail."""
        self._facts: EngineFacts = await self._engine.start()
        self._context = zmq.asyncio.Context()
        self._sockets = Sockets(self._context, key_source(self._spec.keys))
        self._socket = WorkerSocket(self._sockets, self._spec.bind_host)
        # Not before the engine is up: its processes may be forked from this one.
        self._exporter = Exporter(Component.WORKER, self._spec.bind_host)
        return WorkerEntry(
            worker_id=self._spec.worker_id,
            role=self._spec.role,
            endpoint=self._socket.endpoint,
            epoch=self._facts.epoch,
            node=self._spec.bind_host,
            exporter=self._exporter.address,
            layout=self._facts.layout,
        )

    async def run(self) -> None:
        """Serve until `stop`; raise `EngineDead` if the engine cannot go on."""
        tasks = [
            asyncio.create_task(loop)
            for loop in (self._receive(), self._forward(), self._watch(), self._stopping.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._fail_all()
            self._socket.close()
            await self._engine.stop()
            await asyncio.to_thread(self._exporter.close)
            await asyncio.to_thread(self._close_sockets)

    def _close_sockets(self) -> None:
        self._sockets.close()
        self._context.term()

    async def stop(self) -> None:
        """End `run`: open requests fail, the engine's processes end."""
        self._stopping.set()

    async def _fail_all(self) -> None:
        """Tell routers at once rather than let them wait out a silence."""
        for request_id, peer in list(self._owners.items()):
            gone = Failed(request_id, "engine", f"worker {self._spec.worker_id} is going away")
            await self._socket.send(peer, [gone])
        self._owners.clear()

    # Routers.

    async def _receive(self) -> None:
        async for peer, message in self._socket.receive():
            self._peers.setdefault(peer, _Peer(0.0)).last_seen = time.monotonic()
            try:
                await self._handle(peer, message)
            except RequestInvalid as error:
                assert isinstance(message, Prefill | Decode)
                await self._refuse(peer, Failed(message.request_id, "invalid", str(error)))

    async def _handle(self, peer: bytes, message: RouterMessage) -> None:
        if isinstance(message, Heartbeat):
            await self._socket.send(peer, [await self._snapshot()])
        elif isinstance(message, Cancel):
            if self._owners.get(message.request_id) == peer:
                await self._cancel(message.request_id)
        elif isinstance(message, ChangeRole):
            await self._change_role(message)
        else:
            await self._submit(peer, message)

    async def _cancel(self, request_id: RequestId) -> None:
        """End a request; one of the same name may come while it is ended."""
        ending = self._role.cancel(request_id)
        self._metrics.cancel(self._role_name, ending)
        self._forget(request_id)
        if ending.abort:
            await self._engine.abort(ending.abort)
        if ending.release:
            await self._engine.release(ending.release)
        await self._take_next_role()

    async def _submit(self, peer: bytes, message: Prefill | Decode) -> None:
        if message.request_id in self._owners:
            await self._reject(peer, message, "duplicate", "a request of this id is open here")
            return
        if self._next_role is not None:
            leaving = f"this worker leaves the {self._role_name} role"
            await self._reject(peer, message, "leaving", leaving)
            return
        accepted = self._role.accept(message)
        if isinstance(accepted, Rejected):
            await self._reject(peer, message, "role", accepted.reason)
            return
        if not 0 < len(message.prompt_token_ids) <= self._facts.max_model_len:
            reason = f"{len(message.prompt_token_ids)} prompt tokens, 1 to "
            reason += f"{self._facts.max_model_len} fit"
            raise RequestInvalid(reason)
        self._owners[message.request_id] = peer
        self._peers[peer].request_ids.add(message.request_id)
        if len(self._owners) == 1:
            self._work.set_busy(True, time.monotonic())
        await self._engine.submit(accepted)

    async def _reject(
        self, peer: bytes, message: Prefill | Decode, cause: str, reason: str
    ) -> None:
        self._metrics.refuse(cause)
        await self._socket.send(peer, [Rejected(message.request_id, reason)])

    async def _refuse(self, peer: bytes, failed: Failed) -> None:
        self._metrics.refuse("invalid")
        self._role.cancel(failed.request_id)
        self._forget(failed.request_id)
        await self._socket.send(peer, [failed])
        await self._take_next_role()

    # Roles.

    async def _change_role(self, message: ChangeRole) -> None:
        """Remember the role to take; a change to the present one takes an earlier order back."""
        if message.controller_epoch < self._controller_epoch:
            logger.warning("ignored an order of controller epoch %d", message.controller_epoch)
            return
        self._controller_epoch = message.controller_epoch
        self._next_role = None if message.role is self._role_name else message.role
        await self._take_next_role()

    async def _take_next_role(self) -> None:
        """Take the next role once nothing is open in this one, and tell every peer at once."""
        if self._next_role is None or self._owners:
            return
        self._role_name, self._next_role = self._next_role, None
        snapshot = await self._snapshot()
        for peer in list(self._peers):
            await self._socket.send(peer, [snapshot])

    async def _snapshot(self) -> WorkerSnapshot:
        load = await self._engine.load()
        now = time.monotonic()
        self._work.set_busy(bool(self._owners), now)
        self._metrics.show(load, len(self._owners), now, self._sockets.refused)
        return WorkerSnapshot(
            worker_id=self._spec.worker_id,
            role=self._role_name,
            epoch=self._facts.epoch,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            block_size=self._facts.block_size,
            num_blocks=load.num_blocks,
            num_free_blocks=load.num_free_blocks,
            num_held_blocks=load.num_held_blocks,
            num_held_handoffs=load.num_held_handoffs,
            num_requests=len(self._owners),
            generated_tokens=self._work.generated_tokens,
            computed_prompt_tokens=self._work.computed_prompt_tokens,
            busy_s=self._work.busy_s,
            counts=without_times(load.counts),
            holders=load.holders,
        )

    # The engine.

    async def _forward(self) -> None:
        """Turn each engine step's news into one multipart per router."""
        async for outputs in self._engine.outputs():
            await self._send_reports(outputs)

    async def _send_reports(self, outputs: Sequence[EngineOutput]) -> None:
        batches: dict[bytes, list[WorkerMessage]] = {}
        # Nothing is awaited in here: after a cancel the same name may be another request's.
        for output in outputs:
            self._work.count(self._role_name, output)
            self._metrics.count(self._role_name, output)
            report = self._role.report(output)
            if report.message is not None:
                batches.setdefault(self._owners[output.request_id], []).append(report.message)
            if report.is_last:
                self._forget(output.request_id)
        for peer, messages in batches.items():
            await self._socket.send(peer, messages)
        await self._take_next_role()

    # Silence.

    async def _watch(self) -> None:
        """Abort the requests of routers that have not spoken for the time-out and are gone, or
        for `_PATIENCE` times as long."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            if now - before > 2 * _WATCH_S:
                # This loop was held up itself: what routers sent meanwhile is read first.
                continue
            timeout_s = self._spec.config.router.worker_timeout_s
            for peer, state in list(self._peers.items()):
                silent_s = now - state.last_seen
                if silent_s > timeout_s and (
                    silent_s > _PATIENCE * timeout_s
                    or not await self._socket.reaches(peer, await self._snapshot())
                ):
                    await self._drop_peer(peer, state)

    async def _drop_peer(self, peer: bytes, state: _Peer) -> None:
        logger.warning("router %r is silent: ending its %d requests", peer, len(state.request_ids))
        del self._peers[peer]
        self._socket.forget(peer)
        for request_id in list(state.request_ids):
            await self._cancel(request_id)
            # A router that was only held up goes on, and must not wait for what was ended.
            ended = Failed(request_id, "engine", "ended: the router was silent")
            await self._socket.send(peer, [ended])

    def _forget(self, request_id: RequestId) -> None:
        """Drop a request from the tables."""
        peer = self._owners.pop(request_id, None)
        if peer is not None and peer in self._peers:
            self._peers[peer].request_ids.discard(request_id)
        if not self._owners:
            self._work.set_busy(False, time.monotonic())
