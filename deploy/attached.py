"""Removing a deployment from a Ray cluster that goes on without it."""

import re
import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import placement_group_table, remove_placement_group

from cluster.controller_store import ControllerStore
from cluster.errors import Unavailable
from cluster.placer import PREFIX
from cluster.ray_plane import NAMESPACE, find_controller
from cluster.ray_store import RayStore
from deploy.connect import connect_to
from deploy.state import DeploymentState

_STOP_S = 10.0


def remove_from_cluster(state: DeploymentState) -> None:
    """Delete the Serve app, the controller and the workers; a cluster that is gone is fine."""
    try:
        connect_to(state)
    except Unavailable:
        return
    try:
        remove_deployment(state.name)
    finally:
        ray.shutdown()


def remove_deployment(name: str) -> None:
    """The same in a process that is connected."""
    with suppress(Exception):
        serve.delete(name)
    with suppress(Exception):
        controller: Any = find_controller(name)
        ray.get(controller.drain_and_stop.remote(), timeout=_STOP_S)
    for actor_name in deployment_actors(name):
        with suppress(ValueError):
            ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE))
    for group_name in deployment_groups(name):
        with suppress(ValueError):
            remove_placement_group(ray.util.get_placement_group(group_name))
    store = RayStore()
    ControllerStore(store, name).clear()
    store.delete(PREFIX + name)
    deadline = time.monotonic() + _STOP_S
    while deployment_actors(name) and time.monotonic() < deadline:
        time.sleep(0.1)


def deployment_actors(name: str) -> list[str]:
    """Return the names of the deployment's detached actors that are alive."""
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]
    return [each for each in ours if _belongs(name, each)]


def deployment_groups(name: str) -> list[str]:
    """Return the names of the placement groups that the deployment's workers had or have."""
    groups = placement_group_table().values()
    return [g["name"] for g in groups if g["state"] != "REMOVED" and _belongs(name, g["name"])]


def _belongs(deployment: str, name: str) -> bool:
    # Whole names: another deployment may be called `<deployment>-decode`.
    return (
        re.fullmatch(rf"{re.escape(deployment)}-(controller|(prefill|decode)-\d+)", name)
        is not None
    )
