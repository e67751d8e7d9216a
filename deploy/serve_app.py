"""A deployment as a Ray Serve application, for clusters whose apps are deployed with Serve.

In a Serve config file, with the tree of `cluster/config.py` as arguments:

    applications:
      - name: tandem
        import_path: deploy.serve_app:build
        args: {model: {path: ...}, prefill: {workers: 2}, decode: {workers: 2}}

`serve deploy` starts the routers, the first of which starts the controller; with other arguments
the controller goes by them if its workers can (`cluster/reconfigure.py`); deleting the app drains
and removes everything. The endpoint is Serve's: `router.host` and `.port` do not count.
"""

import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve

from cluster.config import TandemConfig, parse_config
from cluster.ray_plane import start_controller
from deploy.app import parts_of
from deploy.dashboard.pages import dashboard_pages
from deploy.session import cluster_environment
from router.deployment import router_application


def build(args: Mapping[str, Any]) -> Any:
    """Return the Serve application; raise `ConfigError` naming every fault of `args`."""
    config = parse_config(args)
    env = cluster_environment(f"{config.cluster.name}:{uuid.uuid4().hex}")
    start = partial(_start_controller, config, env)
    return router_application(config, env, start, dashboard_pages(), revision=time.time())


def _start_controller(config: TandemConfig, env: Mapping[str, str]) -> Any:
    app_name = serve.get_replica_context().app_name
    return start_controller(config, parts_of(config), env, None, app_name)
