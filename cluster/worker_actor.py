"""The one Ray actor class: it hosts a worker and dies with the worker's engine."""

import asyncio
import logging
import os
from pathlib import Path

import ray

from cluster.shared_memory import track_apart
from cluster.snapshot import WorkerEntry
from cluster.worker import Worker
from cluster.worker_spec import Seat, WorkerSpec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

logger = logging.getLogger(__name__)


class WorkerActor:
    """Adapts `Worker` to Ray: each method is one of the worker's, and `run` is a task."""

    def __init__(self) -> None:
        track_apart()
        self._worker: Worker | None = None
        self._entry: WorkerEntry | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_stopping = False

    async def seat(self) -> Seat:
        """Return where this actor runs, before its engine is pinned and started."""
        node = str(ray.get_runtime_context().get_node_id())
        address = str(ray.util.get_node_ip_address())
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return Seat(node, _BOOT_ID, address, cores, os.getpid())

    async def start(self, spec: WorkerSpec) -> WorkerEntry:
        """Start the worker and serve; raise what made it fail."""
        self._worker = Worker(spec)
        self._entry = await self._worker.start()
        self._running = asyncio.create_task(self._run(self._worker))
        return self._entry

    async def _run(self, worker: Worker) -> None:
        """Serve until stopped. A worker whose engine died leaves nothing behind: the process
        ends at once, which is also how the controller learns of it."""
        try:
            await worker.run()
        except Exception:
            logger.exception("the worker ended")
        if not self._is_stopping:
            os._exit(1)

    async def wait(self) -> None:
        """Return when the worker has been stopped; the call fails when the process dies."""
        if self._running is not None:
            await asyncio.wait([self._running])

    async def stop(self) -> None:
        """Stop serving and end the engine's processes; return when they have ended."""
        self._is_stopping = True
        if self._worker is not None:
            await self._worker.stop()
        await self.wait()
