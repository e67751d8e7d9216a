"""The lifecycle plane: how the controller reaches workers, and others the controller, by Ray.

Actors and placement groups are detached: they outlive whoever asked for them, the controller
included, and end with the deployment. Ray restarts a controller that dies; it goes on from what
is in Ray's own store once somebody asks it for something, which routers do every second.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import TandemConfig
from cluster.controller import Controller
from cluster.controller_store import ControllerStore
from cluster.errors import Fenced, Unavailable
from cluster.exporter import Exporter
from cluster.handout import Handout
from cluster.key_office import KeyOffice
from cluster.keyring import Keyring
from cluster.load import RouterLoad
from cluster.names import Component, Role, WorkerId
from cluster.placer import SharedPlacer, bundle_of, worker_name
from cluster.ray_store import RayStore
from cluster.reconfigure import InForce
from cluster.ring_file import key_source
from cluster.service import Counts, RoleNeed, pool_need, service_of
from cluster.snapshot import WorkerEntry
from cluster.targets import Address
from cluster.topology import Node, gpu_type_label, nodes_from_ray
from cluster.worker_actor import WorkerActor
from cluster.worker_spec import Parts, Seat, WorkerSpec

logger = logging.getLogger(__name__)

NAMESPACE = "tandem"
FOLLOW_S = 0.5
RESTART_PAUSE_S = 1.0
# An app is gone when Serve has not listed it this often: it may be restarting.
APP_POLL_S, APP_MISSES = 2.0, 3
NODE_ID_LABEL = "ray.io/node-id"


# What it returns has methods that no type checker knows.
_remote: Any = ray.remote


def controller_name(deployment: str) -> str:
    return f"{deployment}-controller"


def find_group(name: str) -> PlacementGroup | None:
    """Return the worker's placement group, None if there is none of this name."""
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return None


class RayWorker:
    """A worker's process as a detached actor in a placement group of its own; fills
    `members.WorkerHandle`."""

    def __init__(self, actor: Any, group: PlacementGroup | None, handout: Handout) -> None:
        self._actor = actor
        self._group = group
        self._handout = handout

    async def seat(self) -> Seat:
        seat: Seat = await self._actor.seat.remote()
        return seat

    async def adopt(self, controller_epoch: int) -> WorkerEntry | None:
        entry: WorkerEntry | None = await self._actor.adopt.remote(controller_epoch)
        if entry is not None:
            await self._handout.include(self._actor)
        return entry

    async def start(self, spec: WorkerSpec, controller_epoch: int) -> WorkerEntry:
        ring = self._handout.ring_for(self._actor)
        entry: WorkerEntry = await self._actor.start.remote(spec, controller_epoch, ring)
        return entry

    async def wait(self) -> None:
        await self._actor.wait.remote()

    async def stop(self, controller_epoch: int) -> None:
        await self._actor.stop.remote(controller_epoch)

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)


class RayLauncher:
    """Launches worker actors, each in a placement group of one bundle, and finds them again."""

    def __init__(
        self, config: TandemConfig, env: Mapping[str, str], office: KeyOffice | None = None
    ) -> None:
        self._config = config
        self._env = dict(env)
        self._handout = Handout(office)
        self.keys = office.read if office else key_source(config.security.curve_keys)
        self.hand_out = self._handout.hand_out

    def launch(self, worker_id: WorkerId, role: Role, node_id: str | None) -> RayWorker:
        pool = self._config.pool(role)
        name = self._name(worker_id)
        group = placement_group(
            [bundle_of(pool_need(pool))],
            name=name,
            lifetime="detached",
            bundle_label_selector=[{NODE_ID_LABEL: node_id} if node_id else {}],
        )
        actor = (
            _remote(WorkerActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=pool.cpus_per_worker,
                num_gpus=pool.gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
                max_restarts=0,
                runtime_env={"env_vars": self._env},
            )
            .remote()
        )
        return RayWorker(actor, group, self._handout)

    def attach(self, worker_id: WorkerId) -> RayWorker | None:
        name = self._name(worker_id)
        group = find_group(name)
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            # It died with nobody there to see it: its room must not stay taken.
            if group is not None:
                remove_placement_group(group)
            return None
        return RayWorker(actor, group, self._handout)

    def _name(self, worker_id: WorkerId) -> str:
        return worker_name(self._config.cluster.name, worker_id)


class RayInventory:
    """Fills `placer.Inventory` from what Ray's head knows."""

    def nodes(self) -> tuple[Node, ...]:
        return nodes_from_ray(ray.nodes(), ray._private.state.available_resources_per_node())

    def held(self) -> set[str]:
        groups = ray.util.placement_group_table().values()
        return {group["name"] for group in groups if group["state"] == "CREATED"}

    def ask_for(self, needs: Sequence[RoleNeed]) -> None:
        """Ask Ray's autoscaler, where there is one. Only its version 2 heeds GPU types."""
        label = gpu_type_label(ray.nodes())
        request_resources(
            bundles=[bundle_of(need) for need in needs],
            bundle_label_selectors=[
                {label: f"in({','.join(need.gpu_types)})"} if need.gpu_types else {}
                for need in needs
            ],
        )


class ControllerActor:
    """Adapts `Controller` to Ray: documents in and out, and the loop as a task.

    After a restart by Ray nobody calls `run`, so every question starts the loop.
    """

    def __init__(
        self,
        config: TandemConfig,
        parts: Parts,
        env: Mapping[str, str],
        bind_host: str | None,
        app_name: str | None,
    ) -> None:
        self._name = controller_name(config.cluster.name)
        self._app_name = app_name
        self._following: asyncio.Task[None] | None = None
        values = RayStore()
        store = ControllerStore(values, config.cluster.name)
        # What an earlier controller went by holds: its workers were made for that.
        in_force = InForce.from_document(store.load("config")) or InForce(config)
        config = in_force.config
        self._office = _office_of(config, store)
        launcher = RayLauncher(config, env, self._office)
        self._hand_out = launcher.hand_out
        service = service_of(config, Counts(*config.autoscaler.ratio_pair))
        placer = SharedPlacer(service, values, RayInventory())
        self._controller = Controller(
            config, parts, launcher, store, bind_host, placer, in_force.revision
        )
        self._loop: asyncio.Task[None] | None = None
        self._exporter = Exporter(Component.CONTROLLER, bind_host or ray.util.get_node_ip_address())

    async def run(self) -> None:
        """Start the loop unless it runs; a constructor has no event loop to start it in.

        Returns once earlier workers have been taken over: no answer is better than a wrong one.
        Raises `Fenced` once a later controller has.
        """
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
            if self._app_name is not None:
                self._following = asyncio.create_task(self._end_with(self._app_name))
        office = asyncio.create_task(self._controller.in_office())
        await asyncio.wait([self._loop, office], return_when=asyncio.FIRST_COMPLETED)
        office.cancel()
        if self._office is not None:
            self._office.resume(self._hand_out)
        if self._controller.is_fenced:
            raise Fenced("a later controller has taken over")

    async def _run(self) -> None:
        """Run the loop; if it breaks, end the process: Ray starts it again, from its notes."""
        try:
            await self._controller.run()
        except Exception:
            logger.exception("the controller's loop broke")
            await asyncio.sleep(RESTART_PAUSE_S)
            os._exit(1)

    async def follow(
        self, load: dict[str, Any], known_version: int, exporter: str = "", node: str = ""
    ) -> dict[str, Any]:
        """Take in a router's load and where its metrics are; return the workers it may use and
        whether all is well.

        Answers at once if the list is another one than that of `known_version`, else when it
        changes, and in any case after half a second.
        """
        await self.run()
        target = Address(exporter, node, self._controller.now()) if exporter else None
        self._controller.record(RouterLoad.from_document(load), target)
        version = await self._controller.wait_for_change(known_version, FOLLOW_S)
        workers = [entry.as_document() for entry in self._controller.workers()]
        answer = {"version": version, "workers": workers, "health": self._controller.health()}
        return answer | ({"key": self._office.read().used.name} if self._office else {})

    async def keys(self) -> Keyring | None:
        """Return the CURVE keys that members connect with, None if they have none from here."""
        return self._office.read() if self._office is not None else None

    async def rotate_keys(self) -> None:
        """Begin to replace the CURVE keys that were made here."""
        await self.run()
        if self._office is None:
            raise Unavailable("this deployment's CURVE keys, if it has any, are in files of yours")
        self._office.rotate(self._hand_out)

    async def status(self) -> dict[str, Any]:
        await self.run()
        return self._controller.status()

    async def reconfigure(self, offered: InForce) -> TandemConfig:
        """Go by a configuration that was deployed later, if it can be; return the one in force."""
        await self.run()
        return self._controller.reconfigure(offered)

    async def decisions(self, after: int, limit: int) -> list[dict[str, Any]]:
        await self.run()
        return self._controller.decisions(after, limit)

    async def targets(self) -> list[dict[str, Any]]:
        """Return every process of the deployment that can be scraped, this one included."""
        await self.run()
        node = str(ray.get_runtime_context().get_node_id())
        now = self._controller.now()
        return self._controller.targets(Address(self._exporter.address, node, now))

    async def state(self) -> dict[str, Any]:
        await self.run()
        return self._controller.state()

    async def history(self, after: int) -> dict[str, Any]:
        await self.run()
        return self._controller.history(after)

    async def scale(self, prefill: int, decode: int) -> None:
        """Hold both pools at these sizes, whatever the load."""
        await self.run()
        self._controller.scale({Role.PREFILL: prefill, Role.DECODE: decode})

    async def unscale(self) -> None:
        """Leave the sizes to the load again."""
        await self.run()
        self._controller.scale(None)

    async def _end_with(self, app_name: str) -> None:
        """Once the Serve app that we belong to has been deleted, remove everything."""
        num_misses = 0
        while num_misses < APP_MISSES:
            await asyncio.sleep(APP_POLL_S)
            is_there = await asyncio.to_thread(_app_exists, app_name)
            num_misses = 0 if is_there else num_misses + 1
        await self.drain_and_stop()
        ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))

    async def drain_and_stop(self) -> None:
        with suppress(Fenced):
            await self.run()  # after a restart nothing has been taken over yet
        if self._office is not None:
            self._office.close()  # what it wrote down later would outlive the deployment
        await self._controller.drain_and_stop()
        if self._loop is not None:
            await asyncio.gather(self._loop, return_exceptions=True)
        await asyncio.to_thread(self._exporter.close)


def _office_of(config: TandemConfig, store: ControllerStore) -> KeyOffice | None:
    """Return who makes the CURVE keys, None where an operator does or there are none."""
    section = config.security
    is_ours = section.curve and section.curve_keys is None
    return KeyOffice(store, section.key_overlap_s) if is_ours else None


def _app_exists(name: str) -> bool:
    """Return whether Serve has the app; while Serve does not answer, nothing is known."""
    # Only controllers that follow an app pay for it.
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        # Serve's client never lets go of a Serve that was shut down; its actor's name is free then,
        # and taken while it restarts.
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    try:
        return name in serve.status().applications
    except Exception as error:
        logger.warning("Serve does not answer: %s", error)
        return True


def start_controller(
    config: TandemConfig,
    parts: Parts,
    env: Mapping[str, str],
    bind_host: str | None,
    app_name: str | None = None,
) -> Any:
    """Return the deployment's controller, started if there is none.

    With an `app_name` it ends, workers and all, when that Serve app is deleted.
    """
    controller = (
        _remote(ControllerActor)
        .options(
            name=controller_name(config.cluster.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            runtime_env={"env_vars": dict(env)},
        )
        .remote(config, parts, env, bind_host, app_name)
    )
    ray.get(controller.run.remote())
    return controller


def find_controller(deployment: str) -> Any:
    """Return the controller of `deployment`; raise `ValueError` if there is none."""
    return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
