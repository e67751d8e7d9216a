"""The one Ray actor class: it hosts a worker and dies with the worker's engine.

A simulated worker runs in the actor's own process; a vLLM one in a process forked from the
node's template, and the actor is a thin shell around the line to it.
"""

import asyncio
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import ray
from ray.util.placement_group import remove_placement_group

from cluster.config import ClusterSection
from cluster.controller_store import ControllerStore
from cluster.errors import Fenced
from cluster.keyring import Keyring
from cluster.ray_store import RayStore
from cluster.ring_file import RingFile
from cluster.shared_memory import track_apart
from cluster.snapshot import WorkerEntry
from cluster.worker import Worker
from cluster.worker_process import WorkerProcess
from cluster.worker_spec import Seat, WorkerSpec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

_ORPHAN_POLL_S = 10.0

logger = logging.getLogger(__name__)


class WorkerActor:
    """Adapts `Worker` to Ray: each method is one of the worker's, and `run` is a task."""

    def __init__(self) -> None:
        track_apart()
        self._worker: Worker | WorkerProcess | None = None
        self._entry: WorkerEntry | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._watching: asyncio.Task[None] | None = None
        self._is_up = asyncio.Event()
        self._controller_epoch = 0
        self._ring_file: RingFile | None = None

    def _obey(self, controller_epoch: int) -> None:
        """Raise `Fenced` for an order of a controller that a later one has followed."""
        if controller_epoch < self._controller_epoch:
            raise Fenced(f"controller epoch {controller_epoch} is over")
        self._controller_epoch = controller_epoch

    async def seat(self) -> Seat:
        """Return where this actor runs, before its engine is pinned and started."""
        node = str(ray.get_runtime_context().get_node_id())
        address = str(ray.util.get_node_ip_address())
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return Seat(node, _BOOT_ID, address, cores, os.getpid())

    async def adopt(self, controller_epoch: int) -> WorkerEntry | None:
        """Obey a new controller; return the entry once the worker is up, None if it was never
        started."""
        self._obey(controller_epoch)
        if self._worker is None:
            return None
        await self._is_up.wait()
        return self._entry

    async def start(
        self, spec: WorkerSpec, controller_epoch: int, ring: Keyring | None = None
    ) -> WorkerEntry:
        """Start the worker and serve; raise what made it fail.

        `ring` are the keys that it gets from the controller and not from a file.
        """
        self._obey(controller_epoch)
        if ring is not None:
            self._ring_file = RingFile(ring)
            spec = replace(spec, keys=self._ring_file.path)
        self._is_up.clear()
        if spec.config.model.engine == "simulated":
            self._worker = Worker(spec)
        else:
            self._worker = WorkerProcess(spec, str(ray.get_runtime_context().get_node_id()))
        try:
            self._entry = await self._worker.start()
        except Exception:
            self._worker = None
            raise
        finally:
            self._is_up.set()
        self._running = asyncio.create_task(self._run(self._worker))
        self._watching = asyncio.create_task(self._outlive(spec.config.cluster))
        return self._entry

    async def take_keys(self, ring: Keyring) -> None:
        """Go by other keys from now on: the worker's processes look at them every second."""
        if self._ring_file is not None:
            self._ring_file.replace(ring)

    async def _run(self, worker: Worker | WorkerProcess) -> None:
        """Serve until stopped. A worker whose engine died leaves nothing behind: the process
        ends at once, which is also how the controller learns of it."""
        try:
            await worker.run()
        except Exception:
            logger.exception("the worker ended")
        if not self._is_stopping:
            os._exit(1)

    async def _outlive(self, cluster: ClusterSection) -> None:
        """End some minutes after the deployment is gone. A controller that is merely down has
        left its notes; `tandem down` and a deleted app have not, nor has a lost Ray head."""
        store = ControllerStore(RayStore(), cluster.name)
        seen_s = time.monotonic()
        while time.monotonic() - seen_s < cluster.orphan_s:
            await asyncio.sleep(min(_ORPHAN_POLL_S, cluster.orphan_s / 3))
            try:
                if await asyncio.to_thread(store.load, "sizes") is not None:
                    seen_s = time.monotonic()
            except Exception as error:
                logger.warning("Ray's store does not answer: %s", error)
        logger.warning("the deployment is gone: ending")
        await self.stop(self._controller_epoch)
        if (group := ray.util.get_current_placement_group()) is not None:
            remove_placement_group(group)
        os._exit(0)

    async def wait(self) -> None:
        """Return when the worker has been stopped; the call fails when the process dies."""
        if self._running is not None:
            await asyncio.wait([self._running])

    async def stop(self, controller_epoch: int) -> None:
        """Stop serving and end the engine's processes; return when they have ended."""
        self._obey(controller_epoch)
        self._is_stopping = True
        if self._worker is not None:
            await self._worker.stop()
        await self.wait()
