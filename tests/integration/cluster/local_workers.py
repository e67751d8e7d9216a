"""Workers in the test's own process, where the controller expects processes of Ray."""

import asyncio
import os
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.engine import Engine, EngineRequest
from cluster.names import Role, WorkerId
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


@dataclass(eq=False)
class LocalWorker:
    """A worker's "process": it can fail to start, die, or fall silent."""

    worker_id: WorkerId
    error: Exception | None = None
    spec: WorkerSpec | None = None
    task: asyncio.Task[None] | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_killed: bool = False

    async def seat(self) -> Seat:
        return Seat("node-1", "machine-1", "127.0.0.1", CORES, os.getpid())

    async def start(self, spec: WorkerSpec) -> WorkerEntry:
        if self.error is not None:
            raise self.error
        self.spec = spec
        worker = Worker(spec)
        entry = await worker.start()
        self.task = asyncio.create_task(worker.run())
        return entry

    async def wait(self) -> None:
        await self.gone.wait()

    async def stop(self) -> None:
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


@dataclass
class Host:
    """Launches local workers; `errors` are what the next ones fail to start with."""

    errors: list[Exception] = field(default_factory=list)
    launched: dict[WorkerId, LocalWorker] = field(default_factory=dict)

    def launch(self, worker_id: WorkerId, role: Role) -> LocalWorker:
        error = self.errors.pop(0) if self.errors else None
        self.launched[worker_id] = LocalWorker(worker_id, error)
        return self.launched[worker_id]

    @property
    def alive(self) -> list[WorkerId]:
        return [worker.worker_id for worker in self.launched.values() if not worker.is_killed]
