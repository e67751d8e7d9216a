"""What is fixed about a deployment before anything runs: its mark, its folder, its environment.

Ray and Ray Serve read their settings from the environment when they are imported, so `open` comes
before the first import of either.
"""

import os
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster.config import TandemConfig
from deploy import haproxy
from deploy.ports import free_port, free_range
from deploy.processes import child_environment

# A proxy process that was replaced may finish its streams for this long.
_PROXY_HARD_STOP_S = 5
# More router replicas than a machine runs, those being replaced included.
_REPLICA_PORTS = 64
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Session:
    """One run of one deployment. `temp_dir` is None where Ray was there before."""

    name: str
    mark: str
    temp_dir: Path | None
    uses_haproxy: bool

    @property
    def worker_environment(self) -> dict[str, str]:
        """What router replicas and workers get on any cluster."""
        return cluster_environment(self.mark)


def cluster_environment(mark: str) -> dict[str, str]:
    """Return the environment of every process of the deployment with this mark."""
    return child_environment(mark) | _QUIET


def open_session(config: TandemConfig) -> Session:
    """Return a fresh session; this process and all its children run in its environment."""
    mark = f"{config.cluster.name}:{uuid.uuid4().hex}"
    if config.cluster.address is not None:
        session = Session(config.cluster.name, mark, None, False)
        os.environ.update(_QUIET)
        return session
    # Short, because Ray puts Unix sockets under it and those have at most 107 characters.
    temp_dir = Path(tempfile.gettempdir()) / f"td-{mark[-8:]}"
    uses_haproxy = config.router.proxy == "haproxy" and haproxy.is_available()
    session = Session(config.cluster.name, mark, temp_dir, uses_haproxy)
    os.environ.update(session.worker_environment | _RAY | _free_ports() | private_ray(temp_dir))
    if uses_haproxy:
        os.environ.update(_haproxy_environment(temp_dir / "haproxy"))
    return session


_RAY = {
    # A worker's death takes its whole process group along: HAProxy, engine processes.
    "RAY_process_group_cleanup_enabled": "1",
    # Spare processes would not fit: ours all have an environment of their own.
    "RAY_prestart_worker_first_driver": "0",
    # Ray runs its workers at nice 15; here they are the service, not a batch job beside one.
    "RAY_worker_niceness": "0",
    # Ray has no dashboard here that would show what its agent finds out about the processes.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Ray Serve keeps proxies and replicas up this long for load balancers to notice.
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


def private_ray(temp_dir: Path) -> dict[str, str]:
    """Return what a process needs to be part of a private Ray, or to find into it."""
    return {
        # Then a node has the address 127.0.0.1, as where Ray supports single nodes only, and its
        # servers listen there; with any other address they listen on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(temp_dir / "token"),
    }


def _free_ports() -> dict[str, str]:
    """Return ports for what otherwise has a fixed one per machine; another Ray may have it."""
    names = (
        "DASHBOARD_METRIC_PORT",
        "AUTOSCALER_METRIC_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    )
    # Replicas of two deployments would otherwise listen on the same port, which they share
    # silently (SO_REUSEPORT): each would get the other's requests.
    replicas = free_range(_REPLICA_PORTS)
    return {name: str(free_port()) for name in names} | {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas.stop - 1),
    }


def _haproxy_environment(folder: Path) -> dict[str, str]:
    """Serve's paths for HAProxy are the same for all of a machine unless told otherwise."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "launch"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_PROXY_HARD_STOP_S),
    }
