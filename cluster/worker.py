"""One worker: an engine, a role, and the request plane between them. Runs without Ray.

The role decides what a message or an engine output means; this shell moves bytes, keeps the
table of who asked for what, and notices routers that fall silent.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq.asyncio

from cluster.engine import Engine, EngineFacts, EngineLoad, EngineOutput
from cluster.errors import RequestInvalid
from cluster.messages import (
    Cancel,
    Decode,
    Failed,
    Heartbeat,
    Prefill,
    Rejected,
    RouterMessage,
    WorkerMessage,
    WorkerSnapshot,
)
from cluster.names import RequestId
from cluster.request_plane import WorkerSocket
from cluster.roles import Ending, WorkerRole
from cluster.snapshot import WorkerEntry
from cluster.worker_spec import WorkerSpec, load

_WATCH_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peer:
    """One router: when it last spoke, and what it has here."""

    last_seen: float
    request_ids: set[RequestId] = field(default_factory=set)


class Worker:
    """Serves one engine in one role until stopped or until the engine dies."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._role: WorkerRole = load(spec.roles[spec.role])()
        self._engine: Engine = load(spec.engine)(spec)
        self._peers: dict[bytes, _Peer] = {}
        self._owners: dict[RequestId, bytes] = {}
        self._stopping = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Worker {self._spec.worker_id} {self._spec.role} requests={len(self._owners)}>"

    async def start(self) -> WorkerEntry:
        """Start the engine and listen; raise what made the engine fail."""
        self._facts: EngineFacts = await self._engine.start()
        self._socket = WorkerSocket(zmq.asyncio.Context.instance(), self._spec.bind_host)
        return WorkerEntry(
            worker_id=self._spec.worker_id,
            role=self._spec.role,
            endpoint=self._socket.endpoint,
            epoch=self._facts.epoch,
            node=self._spec.bind_host,
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
            await self._socket.send(peer, [self._snapshot(await self._engine.load())])
        elif isinstance(message, Cancel):
            if self._owners.get(message.request_id) == peer:
                self._forget(message.request_id)
                await self._end(self._role.cancel(message.request_id))
        else:
            await self._submit(peer, message)

    async def _submit(self, peer: bytes, message: Prefill | Decode) -> None:
        if message.request_id in self._owners:
            taken = Rejected(message.request_id, "a request of this id is open here")
            await self._socket.send(peer, [taken])
            return
        accepted = self._role.accept(message)
        if isinstance(accepted, Rejected):
            await self._socket.send(peer, [accepted])
            return
        if not 0 < len(message.prompt_token_ids) <= self._facts.max_model_len:
            reason = f"{len(message.prompt_token_ids)} prompt tokens, 1 to "
            reason += f"{self._facts.max_model_len} fit"
            raise RequestInvalid(reason)
        self._owners[message.request_id] = peer
        self._peers[peer].request_ids.add(message.request_id)
        await self._engine.submit(accepted)

    async def _refuse(self, peer: bytes, failed: Failed) -> None:
        self._forget(failed.request_id)
        self._role.cancel(failed.request_id)
        await self._socket.send(peer, [failed])

    def _snapshot(self, load: EngineLoad) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=self._spec.worker_id,
            role=self._spec.role,
            epoch=self._facts.epoch,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_blocks=load.num_blocks,
            num_free_blocks=load.num_free_blocks,
            num_held_blocks=load.num_held_blocks,
            num_held_handoffs=load.num_held_handoffs,
            num_requests=len(self._owners),
            counts=load.counts,
        )

    # The engine.

    async def _forward(self) -> None:
        """Turn each engine step's news into one multipart per router."""
        async for outputs in self._engine.outputs():
            await self._send_reports(outputs)

    async def _send_reports(self, outputs: Sequence[EngineOutput]) -> None:
        batches: dict[bytes, list[WorkerMessage]] = {}
        for output in outputs:
            report = self._role.report(output)
            peer = self._owners.get(output.request_id)
            if report.message is not None and peer is not None:
                batches.setdefault(peer, []).append(report.message)
            if report.is_last:
                self._forget(output.request_id)
            await self._end(report.ending)
        for peer, messages in batches.items():
            await self._socket.send(peer, messages)

    async def _end(self, ending: Ending) -> None:
        if ending.abort:
            await self._engine.abort(ending.abort)
        if ending.release:
            await self._engine.release(ending.release)

    # Silence.

    async def _watch(self) -> None:
        """Abort the requests of routers that have not spoken for the time-out."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            if now - before > 2 * _WATCH_S:
                # This loop was held up itself: what routers sent meanwhile is read first.
                continue
            silent_since = now - self._spec.config.router.worker_timeout_s
            for peer, state in list(self._peers.items()):
                if state.last_seen < silent_since:
                    await self._drop_peer(peer, state)

    async def _drop_peer(self, peer: bytes, state: _Peer) -> None:
        logger.warning("router %r is silent: ending its %d requests", peer, len(state.request_ids))
        del self._peers[peer]
        for request_id in list(state.request_ids):
            self._owners.pop(request_id, None)
            await self._end(self._role.cancel(request_id))
            # A router that was only held up goes on, and must not wait for what was ended.
            ended = Failed(request_id, "engine", "ended: the router was silent")
            await self._socket.send(peer, [ended])

    def _forget(self, request_id: RequestId) -> None:
        peer = self._owners.pop(request_id, None)
        if peer is not None and peer in self._peers:
            self._peers[peer].request_ids.discard(request_id)
