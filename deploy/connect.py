"""Joining a Ray cluster that is there already."""

import logging
import os
import socket
from pathlib import Path

from cluster.errors import Unavailable
from deploy.session import private_ray
from deploy.state import DeploymentState

_CONNECT_S = 3.0


def connect(address: str, verbose: bool = False) -> None:
    """Initialise Ray in this process; raise `Unavailable` if no cluster answers.

    Ray itself tries for minutes to reach a head that is not there.
    """
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        import ray

        from cluster.ray_plane import NAMESPACE

        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {error}") from None


def connect_to(state: DeploymentState) -> None:
    """The same for the cluster of a deployment started from this machine."""
    if state.temp_dir is not None:
        if not state.launcher.is_alive:
            raise Unavailable(
                f"the launcher of {state.name!r} is gone; "
                f"`tandem down --name {state.name}` clears what it left"
            )
        # Read when Ray is imported.
        os.environ.update(private_ray(Path(state.temp_dir)))
    connect(state.ray_address or "")
