"""The lifecycle plane: how the controller reaches workers, and others the controller, by Ray.

Actors are detached: they outlive whoever asked for them and end with the deployment.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import ray

from cluster.config import PoolSection, TandemConfig
from cluster.controller import Controller
from cluster.names import Role, WorkerId
from cluster.snapshot import WorkerEntry
from cluster.worker_actor import WorkerActor
from cluster.worker_spec import Parts, Seat, WorkerSpec

NAMESPACE = "tandem"


# What it returns has methods that no type checker knows.
_remote: Any = ray.remote


def controller_name(deployment: str) -> str:
    return f"{deployment}-controller"


class RayWorker:
    """A worker's process as a detached actor; fills `controller.WorkerHandle`."""

    def __init__(self, name: str, pool: PoolSection, env: Mapping[str, str]) -> None:
        self._actor: Any = (
            _remote(WorkerActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=pool.cpus_per_worker,
                num_gpus=pool.gpus_per_worker,
                max_restarts=0,
                runtime_env={"env_vars": dict(env)},
            )
            .remote()
        )

    async def seat(self) -> Seat:
        seat: Seat = await self._actor.seat.remote()
        return seat

    async def start(self, spec: WorkerSpec) -> WorkerEntry:
        entry: WorkerEntry = await self._actor.start.remote(spec)
        return entry

    async def wait(self) -> None:
        await self._actor.wait.remote()

    async def stop(self) -> None:
        await self._actor.stop.remote()

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)


class ControllerActor:
    """Adapts `Controller` to Ray: documents out, and the loop as a task."""

    def __init__(
        self, config: TandemConfig, parts: Parts, env: Mapping[str, str], bind_host: str | None
    ) -> None:
        def launch(worker_id: WorkerId, role: Role) -> RayWorker:
            pool = config.prefill if role is Role.PREFILL else config.decode
            return RayWorker(f"{config.cluster.name}-{worker_id}", pool, env)

        self._controller = Controller(config, parts, launch, bind_host)
        self._loop: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Start the loop unless it runs; a constructor has no event loop to start it in."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._controller.run())

    async def workers(self) -> list[dict[str, Any]]:
        return [entry.as_document() for entry in self._controller.workers()]

    async def status(self) -> dict[str, Any]:
        return self._controller.status()

    async def health(self) -> tuple[bool, str]:
        return self._controller.health()

    async def drain_and_stop(self) -> None:
        await self._controller.drain_and_stop()
        if self._loop is not None:
            await asyncio.gather(self._loop, return_exceptions=True)


def start_controller(
    config: TandemConfig, parts: Parts, env: Mapping[str, str], bind_host: str | None
) -> Any:
    """Return the deployment's controller, started if there is none."""
    controller = (
        _remote(ControllerActor)
        .options(
            name=controller_name(config.cluster.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            runtime_env={"env_vars": dict(env)},
        )
        .remote(config, parts, env, bind_host)
    )
    ray.get(controller.run.remote())
    return controller


def find_controller(deployment: str) -> Any:
    """Return the controller of `deployment`; raise `ValueError` if there is none."""
    return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
