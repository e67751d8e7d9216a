"""Workers in the test's own process, where the controller expects processes of Ray."""

import asyncio
import os
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.engine import Engine, EngineRequest
from cluster.errors import Fenced
from cluster.names import Role, WorkerId
from cluster.ring_file import KeySource, key_source
from cluster.snapshot import WorkerEntry
from cluster.worker import Worker
from cluster.worker_spec import Seat, WorkerSpec
from deploy.engines import simulated_engine

CORES = (0, 1, 2, 3)


def deaf_engine(spec: WorkerSpec) -> Engine:
    """An engine that computes every prompt itself and never pulls: two prefills, no hand-off."""
    engine: Any = simulated_engine(spec)
    submit = engine.submit

    async def submit_locally(request: EngineRequest) -> None:
        await submit(replace(request, consume=None))

    engine.submit = submit_locally
    return engine  # type: ignore[no-any-return]


def uneven_engine(spec: WorkerSpec) -> Engine:
    """An engine with larger blocks in every worker but the first of its pool."""
    is_first = spec.worker_id.endswith("-1")
    model = spec.config.model.model_copy(update={"block_size": 16 if is_first else 32})
    return simulated_engine(replace(spec, config=spec.config.model_copy(update={"model": model})))


def odd_decode_engine(spec: WorkerSpec) -> Engine:
    """An engine with larger blocks in every decode worker but the first."""
    return simulated_engine(spec) if spec.role is Role.PREFILL else uneven_engine(spec)


@dataclass(eq=False)
class LocalWorker:
    """A worker's "process": it can fail to start, die, or fall silent."""

    worker_id: WorkerId
    error: Exception | None = None
    start_s: float = 0.0
    spec: WorkerSpec | None = None
    task: asyncio.Task[None] | None = None
    entry: WorkerEntry | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_killed: bool = False
    controller_epoch: int = 0
    keys_file: str | None = None

    async def seat(self) -> Seat:
        return Seat("node-1", "machine-1", "127.0.0.1", CORES, os.getpid())

    def _obey(self, controller_epoch: int) -> None:
        if controller_epoch < self.controller_epoch:
            raise Fenced(f"epoch {controller_epoch} is over")
        self.controller_epoch = controller_epoch

    async def adopt(self, controller_epoch: int) -> WorkerEntry | None:
        self._obey(controller_epoch)
        if self.spec is not None:
            await self.up.wait()
        return self.entry

    async def start(self, spec: WorkerSpec, controller_epoch: int) -> WorkerEntry:
        self._obey(controller_epoch)
        if self.error is not None:
            raise self.error
        self.spec = spec = replace(spec, keys=self.keys_file)
        # A start goes on when the controller that asked for it is gone.
        await asyncio.shield(asyncio.create_task(self._start(Worker(spec))))
        assert self.entry is not None
        return self.entry

    async def _start(self, worker: Worker) -> None:
        await asyncio.sleep(self.start_s)
        self.entry = await worker.start()
        self.task = asyncio.create_task(worker.run())
        self.up.set()

    async def wait(self) -> None:
        await self.gone.wait()

    async def stop(self, controller_epoch: int) -> None:
        self._obey(controller_epoch)
        await self.fall_silent()

    def kill(self) -> None:
        self.is_killed = True
        self.gone.set()
        if self.task is not None:
            self.task.cancel()

    async def fall_silent(self) -> None:
        """Stop answering, with the process still there."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class MemoryStore:
    """A key-value store that outlives the controllers of one test."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def put_new(self, key: str, value: bytes) -> bool:
        is_new = key not in self._values
        self._values.setdefault(key, value)
        return is_new

    def delete(self, key: str) -> None:
        self._values.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in list(self._values) if key.startswith(prefix)]


@dataclass
class Host:
    """Launches local workers; `errors` are what the next ones fail to start with."""

    errors: list[Exception] = field(default_factory=list)
    start_s: float = 0.0
    launched: dict[WorkerId, LocalWorker] = field(default_factory=dict)
    keys_file: str | None = None

    @property
    def keys(self) -> KeySource | None:
        return key_source(self.keys_file)

    def launch(self, worker_id: WorkerId, role: Role, node_id: str | None) -> LocalWorker:
        error = self.errors.pop(0) if self.errors else None
        worker = LocalWorker(worker_id, error, self.start_s, keys_file=self.keys_file)
        self.launched[worker_id] = worker
        return self.launched[worker_id]

    def attach(self, worker_id: WorkerId) -> LocalWorker | None:
        worker = self.launched.get(worker_id)
        return None if worker is None or worker.is_killed else worker

    @property
    def alive(self) -> list[WorkerId]:
        return [worker.worker_id for worker in self.launched.values() if not worker.is_killed]
