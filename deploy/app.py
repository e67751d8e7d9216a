"""Composition root (step 10): from a configuration to a running deployment, and back to nothing.

Concrete classes are named in `deploy.engines`; everything below gets them as "module:Class". Import
it after `session.open_session`.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
import ray
from ray import serve

from cluster.config import TandemConfig
from cluster.errors import TandemError, Unavailable
from cluster.ray_plane import find_controller, start_controller
from cluster.worker_spec import Parts
from deploy import signals
from deploy.access import Access, require_readable
from deploy.connect import connect
from deploy.dashboard.pages import dashboard_pages
from deploy.engines import AUTOSCALER, ENGINES, ROLES
from deploy.local_ray import start_local_ray
from deploy.ports import require_free
from deploy.processes import ProcessId, end_marked
from deploy.session import Session
from deploy.state import DeploymentState
from router.deployment import router_application

# Ctrl-C must have left nothing after 15 s: this much for a clean stop, then the mark decides.
STOP_S = 10.0
_CONTROLLER_STOP_S = 6.0
_TERM_GRACE_S = 1.5
_POLL_S = 0.25
_LOOPBACK = "127.0.0.1"


def parts_of(config: TandemConfig) -> Parts:
    """Return the classes a worker is built of."""
    return Parts(ENGINES[config.model.engine], ROLES, AUTOSCALER)


class Deployment:
    """One deployment, from its first process to its last. `say` gets a line per event."""

    def __init__(
        self, config: TandemConfig, session: Session, say: Callable[[str], None], verbose: bool
    ) -> None:
        self._config = config
        self._session = session
        self._say = say
        self._verbose = verbose
        self._controller: Any = None
        self._has_router = False
        self._owns_serve = False
        self._num_events_said = 0
        self._state: DeploymentState | None = None
        host_and_port = f"{_reachable(config.router.host)}:{config.router.port}"
        self.access = Access.of(host_and_port, config.security)
        self.url = self.access.url

    def start(self) -> None:
        """Return once requests are served end to end; raise `TandemError` saying why not."""
        started_at = time.monotonic()
        require_readable(self._config.security)
        require_free(self._config.router.host, self._config.router.port)
        self._start_ray()
        if self._config.cluster.address is not None:
            self._refuse_another_of_the_name()
        env = self._session.worker_environment
        bind_host = _LOOPBACK if self._config.cluster.address is None else None
        start = partial(start_controller, self._config, parts_of(self._config), env, bind_host)
        self._controller = start()
        self._start_router(env, start, bind_host)
        self._wait_until_serving(started_at)

    def _refuse_another_of_the_name(self) -> None:
        """A deployment of this name on the cluster is somebody's: its pools would be ours."""
        name = self._config.cluster.name
        try:
            find_controller(name)
        except ValueError:
            return
        raise Unavailable(
            f"a deployment named {name!r} runs on that cluster already: give this one another"
            " --name, or take that one down where it was started"
        )

    def _start_ray(self) -> None:
        self._join_ray()
        signals.catch()

    def _join_ray(self) -> None:
        address, temp_dir = self._config.cluster.address, self._session.temp_dir
        # On disk before anything runs, so that whatever ends us can be cleaned up after.
        self._write_state(address)
        if temp_dir is None:
            connect(str(address), self._verbose)
            self._say(f"attached to the Ray cluster at {address}")
            return
        address = start_local_ray(self._config, self._session, temp_dir, self._verbose)
        self._write_state(address)
        proxy = "HAProxy" if self._session.uses_haproxy else "Ray Serve's own proxy"
        self._say(f"Ray is up at {address}, files in {temp_dir}, HTTP through {proxy}")

    def _write_state(self, address: str | None) -> None:
        launcher = ProcessId.of(os.getpid())
        assert launcher is not None
        session, access = self._session, self.access
        folder = str(session.temp_dir) if session.temp_dir else None
        self._state = DeploymentState(
            session.name,
            session.mark,
            launcher,
            access.url,
            address,
            folder,
            access.operator_key,
            access.certificate,
        )
        self._state.write()

    def example(self) -> str:
        """Return a command line that works against this deployment."""
        body = f'{{"model": "{self._config.model.name}", "prompt": "In the beginning", '
        body += '"max_tokens": 32, "temperature": 0}'
        header, section = "-H 'content-type: application/json'", self._config.security
        if section.api_keys is not None:
            header += f' -H "authorization: Bearer $(cat {section.operator_key or "KEY_FILE"})"'
        trust = f" --cacert {section.tls_cert}" if section.tls_cert is not None else ""
        return f"curl {self.url}/v1/completions{trust} {header} -d '{body}'"

    def _start_router(
        self, env: dict[str, str], start_controller: Callable[[], Any], bind_host: str | None
    ) -> None:
        router = self._config.router
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # From here on there is something of ours in Serve; all of Serve only if it is new.
        self._has_router = True
        self._owns_serve = not serve.status().proxies
        serve.start(
            proxy_location="HeadOnly" if self._config.cluster.address is None else "EveryNode",
            http_options={"host": self._serve_host(), "port": router.port, **self._tls_options()},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run_many(
            [
                serve.RunTarget(
                    router_application(
                        self._config, env, start_controller, dashboard_pages(), bind_host
                    ),
                    self._session.name,
                    "/",
                )
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def _serve_host(self) -> str:
        """Return what Serve is told; its replicas listen there too, in plain HTTP. Where the
        endpoint is our HAProxy's, on one machine, that is none of another machine's business."""
        return _LOOPBACK if self._session.uses_haproxy else self._config.router.host

    def _tls_options(self) -> dict[str, str]:
        """Return what Serve's own proxy is told; ours gets it from `deploy.haproxy`."""
        section = self._config.security
        if section.tls_cert is None or section.tls_key is None or self._session.uses_haproxy:
            return {}
        return {"ssl_certfile": section.tls_cert, "ssl_keyfile": section.tls_key}

    def _wait_until_serving(self, started_at: float) -> None:
        deadline = started_at + self._config.cluster.start_timeout_s
        while True:
            status = self.status()
            self._say_events(status)
            if status["failing"]:
                hint = "" if self._verbose else "; --verbose shows the workers' logs"
                raise Unavailable(f"{status['reason']}{hint}")
            router = serve.status().applications.get(self._session.name)
            if router is not None and router.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise Unavailable(f"the router does not start: {router.message}")
            answer = self._ask_health() if status["healthy"] else str(status["reason"])
            if answer is None:
                self._say(f"serving after {time.monotonic() - started_at:.1f} s")
                return
            if time.monotonic() > deadline:
                limit_s = self._config.cluster.start_timeout_s
                raise Unavailable(f"not serving within {limit_s:.0f} s: {answer}")
            time.sleep(_POLL_S)

    def _ask_health(self) -> str | None:
        """Return None if the endpoint says that it serves, else what is wrong."""
        try:
            answer = self.access.get("/health", 5.0)
        except httpx.HTTPError as error:
            note = "" if self._owns_serve else "; Serve ran there already and keeps its own port"
            return f"{self.url} does not answer: {error}{note}"
        return None if answer.status_code == 200 else f"the endpoint says: {answer.text[:500]}"

    def status(self) -> dict[str, Any]:
        """Return the controller's view."""
        try:
            status: dict[str, Any] = ray.get(self._controller.status.remote(), timeout=10.0)
        except ray.exceptions.RayError as error:
            raise Unavailable(f"the controller does not answer: {error}") from None
        return status

    def watch(self, is_over: threading.Event) -> None:
        """Say what happens to the workers until `is_over`."""
        while not is_over.wait(1.0):
            with suppress(TandemError):
                self._say_events(self.status())

    def _say_events(self, status: dict[str, Any]) -> None:
        for number, event in status["events"]:
            if number > self._num_events_said:
                self._num_events_said = number
                self._say(event)

    def stop(self) -> bool:
        """End everything this deployment started. Never fails, takes at most about 12 s.

        Return False if something had to be ended by force: then this process must not wait at
        its exit for what Ray wants to say to a cluster that is gone.

        What can be asked to stop is asked, in a thread because Ray's calls cannot all be given
        a time limit; then the mark finds what is left.
        """
        if self._state is None:
            return True
        asking = threading.Thread(target=self._ask_to_stop, daemon=True)
        asking.start()
        asking.join(STOP_S)
        end_marked(self._session.mark, _TERM_GRACE_S)
        if self._state.temp_dir is not None:
            shutil.rmtree(self._state.temp_dir, ignore_errors=True)
        self._state.remove()
        return not asking.is_alive()

    def _ask_to_stop(self) -> None:
        if not ray.is_initialized():
            # Asked for anything, Serve would start a Ray of its own.
            return
        with suppress(Exception):
            # Requests drain here, while the workers still run.
            if self._has_router:
                serve.delete(self._session.name)
            if self._owns_serve and self._session.temp_dir is None:
                serve.shutdown()
        if self._controller is not None:
            with suppress(Exception):
                ray.get(self._controller.drain_and_stop.remote(), timeout=_CONTROLLER_STOP_S)
            with suppress(Exception):
                ray.kill(self._controller)
        with suppress(Exception):
            ray.shutdown()


def _reachable(host: str) -> str:
    return {"0.0.0.0": _LOOPBACK, "::": "[::1]"}.get(host, host)
