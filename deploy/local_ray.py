"""A private Ray of this process's own: it ends with the process, and shares nothing with others.

`ray.init` starts the head as children that the kernel ends with us (they ask for a parent-death
signal), so even SIGKILL of the launcher takes the cluster down. All its files lie in one folder
that only we can read.
"""

import logging
import os
import secrets
from pathlib import Path
from typing import Any

import ray

from cluster.config import SecuritySection, TandemConfig
from cluster.errors import Unavailable
from cluster.ray_plane import NAMESPACE
from deploy import haproxy
from deploy.private_file import write_private
from deploy.session import Session

# Objects never carry requests or KV caches; Ray refuses less than about 75 MB.
_OBJECT_STORE_BYTES = 100 << 20


def start_local_ray(config: TandemConfig, session: Session, temp_dir: Path, verbose: bool) -> str:
    """Start a Ray big enough for the configured pools and return its address.

    Call it from the main thread: the parent-death signal is tied to the thread that starts the
    children.
    """
    temp_dir.mkdir(mode=0o700)
    (temp_dir / "token").write_text(secrets.token_hex(32))
    # Ray opens the folder it is given to all users: it gets one inside ours.
    ray_dir = temp_dir / "r"
    if session.uses_haproxy:
        (temp_dir / "haproxy").mkdir(mode=0o700)
        certificate = _write_certificate(config.security, temp_dir / "haproxy" / "endpoint.pem")
        haproxy.write_launcher(temp_dir / "haproxy" / "launch", config.router.host, certificate)
    try:
        context: Any = ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=_num_cpus(config),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            _temp_dir=str(ray_dir),
        )
    except Exception as error:
        # Ray raises bare `Exception`s, for example where the machine is too busy.
        raise Unavailable(f"Ray did not start: {error}") from error
    return str(context.address_info["address"])


def _write_certificate(section: SecuritySection, path: Path) -> Path | None:
    """Put chain and key into one file for HAProxy, if the endpoint is to have them."""
    if section.tls_cert is None or section.tls_key is None:
        return None
    parts = (Path(section.tls_cert).read_text(), Path(section.tls_key).read_text())
    write_private(path, "\n".join(parts))
    return path


def _num_cpus(config: TandemConfig) -> int:
    """Pools larger than the machine share its cores: here Ray's count is only bookkeeping."""
    bounds = config.autoscaler
    most_prefill = max(config.prefill.workers, bounds.max_prefill) * config.prefill.cpus_per_worker
    most_decode = max(config.decode.workers, bounds.max_decode) * config.decode.cpus_per_worker
    standby = config.cluster.standby * config.decode.cpus_per_worker
    # Workers on their way out still hold theirs while their successors start.
    wanted = 2 * (most_prefill + most_decode + standby)
    return max(wanted, len(os.sched_getaffinity(0)))
