"""The router as a Ray Serve deployment: builds the parts of a router and keeps its list fresh.

Each replica is a whole router of its own. It follows the controller, which answers when the list
of workers changes or after a moment, and goes on with the last list while nobody answers. The
first replica to find no controller starts one: an app that Ray Serve deploys needs nothing else.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ray
import zmq.asyncio
from ray import serve

from cluster.config import TandemConfig
from cluster.errors import Unavailable, summarise
from cluster.exporter import Exporter
from cluster.imports import uncollected
from cluster.keyring import Keyring
from cluster.load import RouterLoad
from cluster.metrics import READY_LINKS, WAITING_REQUESTS
from cluster.names import Component, Role, RouterId
from cluster.reconfigure import InForce, differences, refusal
from cluster.ring_file import KeySource, key_source
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets
from cluster.watched_file import WatchedFile
from router.api_keys import ApiKeys, parse_api_keys
from router.exchange import REQUEST_ID_HEADER, AsgiApp, Message, Receive, Scope, Send
from router.flow import Flow
from router.measures import Objectives
from router.membership import Membership
from router.pages import Pages
from router.records import Records, RequestRecord
from router.surface import Operations, build_surface

if TYPE_CHECKING:
    from router.traces import Traces

RETRY_S = 0.5
_ANSWER_TIMEOUT_S = 3.0
_SETTLE_S = 10.0
# Admission is the flow's: Serve must not queue or refuse before it.
_MAX_ONGOING = 10_000

logger = logging.getLogger(__name__)


class ControllerView:
    """What the controller last said, and whether it still says anything.

    Each time it is found it is told of the configuration deployed with this router; `running`
    is the one it goes by.
    """

    def __init__(self, start: Callable[[], Any], deployed: InForce) -> None:
        self._start = start
        self._deployed = deployed
        self._controller: Any = None
        self._version = 0
        self._ring: Keyring | None = None
        self.health: tuple[bool, str] | None = None
        self.running = deployed.config

    def ring(self) -> Keyring:
        """Return the CURVE keys that the controller made; they come before the first worker."""
        assert self._ring is not None
        return self._ring

    async def settle(self) -> TandemConfig:
        """Return the configuration in force: ours if the controller does not answer for long."""
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            async with asyncio.timeout(_SETTLE_S):
                await self.controller()
        return self.running

    async def ask(
        self, load: RouterLoad, where: Mapping[str, str] = MappingProxyType({})
    ) -> Sequence[WorkerEntry] | None:
        """Return the workers that may serve, None if the controller does not answer.

        Tells it this router's load and where its metrics are (`exporter`, `node`); waits a
        moment for the list to change.
        """
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                controller = await self.controller()
                answer = await controller.follow.remote(load.as_document(), self._version, **where)
                if answer.get("key") not in (None, self._ring and self._ring.used.name):
                    self._ring = await controller.keys.remote()
                self.health, self._version = answer["health"], answer["version"]
                return [WorkerEntry.from_document(document) for document in answer["workers"]]
        except (TimeoutError, KeyError, TypeError, ValueError, ray.exceptions.RayError) as error:
            # It may come back under the same name, as another actor, or of another version.
            self._controller, self.health, self._version = None, None, 0
            logger.warning("the controller does not answer as it should: %s", error)
            return None

    async def decisions(self, after: int, limit: int) -> Sequence[Mapping[str, object]]:
        """Return up to `limit` decisions that follow number `after`, oldest first."""
        page: list[Mapping[str, object]] = await self._question("decisions", after, limit)
        return page

    async def state(self) -> Mapping[str, object]:
        state: Mapping[str, object] = await self._question("state")
        return state

    async def history(self, after: int) -> Mapping[str, object]:
        """Return the samples later than Unix second `after`."""
        history: Mapping[str, object] = await self._question("history", after)
        return history

    async def targets(self) -> Sequence[Mapping[str, object]]:
        """Return the processes that can be scraped."""
        targets: list[Mapping[str, object]] = await self._question("targets")
        return targets

    async def _question(self, name: str, *arguments: int) -> Any:
        """Return what the controller answers an operator.

        Raise `Unavailable` if it does not; `ask` finds or starts the next.
        """
        if self._controller is None:
            raise Unavailable("the controller does not answer this router")
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await getattr(self._controller, name).remote(*arguments)
        except (TimeoutError, ray.exceptions.RayError) as error:
            is_late = isinstance(error, TimeoutError)
            reason = f"nothing within {_ANSWER_TIMEOUT_S:g} s" if is_late else summarise(error)
            raise Unavailable(f"the controller does not answer: {reason}") from None

    async def controller(self) -> Any:
        """Return the deployment's controller, started if there is none, and told of our
        configuration."""
        if self._controller is None:
            controller = await asyncio.to_thread(self._start)
            self.running = await controller.reconfigure.remote(self._deployed)
            self._controller = controller
        return self._controller


class RouterReplica:
    """One router: links, flow, records, HTTP surface. Serve calls the dunder methods."""

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self,
        deployed: InForce,
        start_controller: Callable[[], Any],
        pages: Pages,
        bind_host: str | None = None,
    ) -> None:
        # vLLM's front-end takes seconds to import and only replicas need it.
        with uncollected():
            from router.app import build_frontend

        self._view = ControllerView(start_controller, deployed)
        # A configuration that the workers are not fit for is refused: then we are not, either.
        self._config = config = await self._view.settle()
        self._records = Records(config.router.records)
        self._context = zmq.asyncio.Context()
        self._router_id = RouterId(f"{config.cluster.name}-router-{uuid.uuid4().hex[:8]}")
        timeout_s = config.router.worker_timeout_s
        sockets = Sockets(self._context, _sockets_keys(config, self._view))
        self._membership = Membership(sockets, self._router_id, timeout_s)
        self._traces = _open_traces(config, self._router_id)
        objectives = Objectives(config.autoscaler.slo_ttft_s, config.autoscaler.slo_tbt_s)
        self._flow = Flow(
            config.router,
            self._membership,
            self._records,
            Random(),
            objectives,
            self._traces.record if self._traces else lambda _record: None,
        )
        frontend = await build_frontend(config.model, self._flow, config.router.max_sequences)
        operations = Operations(
            self._health,
            self._record,
            self._recent,
            self._flow.status,
            self._view.decisions,
            self._view.targets,
            self._view.state,
            self._view.history,
        )
        surface = build_surface(
            {config.model.name: frontend},
            operations,
            self._latest_record,
            config.router,
            pages,
            _keys_in_force(config),
        )
        self._surface = WithoutRequestId(surface)
        self._exporter = Exporter(Component.ROUTER, bind_host or ray.util.get_node_ip_address())
        node = str(ray.get_runtime_context().get_node_id())
        self._where = {"exporter": self._exporter.address, "node": node}
        self._polling = asyncio.create_task(self._poll())

    def __serve_build_asgi_app__(self) -> AsgiApp:
        return self._surface

    async def check_health(self) -> None:
        """Serve replaces a replica that fails this, streams and all: it asks for liveness
        only. Whether requests can be served is what `/health` says."""
        if self._polling.done():
            raise RuntimeError("the router no longer follows the controller")
        if (why := self._misfit()) is not None:
            raise RuntimeError(f"the workers go by another configuration: {why}")

    async def __del__(self) -> None:
        self._polling.cancel()
        await asyncio.gather(self._polling, return_exceptions=True)
        self._flow.close()
        await self._membership.close()
        self._context.destroy(linger=0)
        await asyncio.to_thread(self._exporter.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def _poll(self) -> None:
        while True:
            load = self._flow.meter.load(self._router_id, time.time())
            self._show()
            entries = await self._view.ask(load, self._where)
            if entries is None:
                await asyncio.sleep(RETRY_S)
            else:
                await self._membership.update(entries if self._misfit() is None else ())

    def _misfit(self) -> str | None:
        """Return why this router's configuration is not for the workers there are, if so."""
        running = self._view.running
        return None if running is self._config else refusal(differences(self._config, running))

    def _show(self) -> None:
        WAITING_REQUESTS.set(self._flow.num_waiting)
        for role in Role:
            READY_LINKS.labels(role.value).set(len(self._membership.ready(role)))

    def _health(self) -> tuple[bool, str]:
        if self._view.health is not None and not self._view.health[0]:
            return self._view.health
        missing = [role.value for role in Role if not self._membership.ready(role)]
        if missing:
            return False, f"no {' and no '.join(missing)} worker answers this router"
        return True, "serving"

    def _latest_record(self, exchange_id: str) -> RequestRecord | None:
        exchange = self._records.get(exchange_id)
        return exchange.sequences[-1] if exchange is not None else None

    def _record(self, exchange_id: str) -> Mapping[str, object] | None:
        exchange = self._records.get(exchange_id)
        return exchange.as_document() if exchange is not None else None

    def _recent(self, num: int) -> list[Mapping[str, object]]:
        # Records are timed by the loop's clock.
        began_at = time.time() - asyncio.get_running_loop().time()
        return [
            {
                "exchange_id": record.exchange_id,
                "router_id": self._router_id,
                "arrived_at": began_at + record.timeline.arrived_s,
                **record.as_document(),
            }
            for record in self._records.latest(num)
        ]


def _sockets_keys(config: TandemConfig, view: ControllerView) -> KeySource | None:
    """Return where the CURVE keys come from: a file, or the controller; None without them."""
    if not config.security.curve:
        return None
    return key_source(config.security.curve_keys) or view.ring


def _keys_in_force(config: TandemConfig) -> Callable[[], ApiKeys] | None:
    """Return what reads the API keys, None if there is no file of them."""
    path = config.security.api_keys
    return WatchedFile(Path(path), parse_api_keys).read if path is not None else None


def _open_traces(config: TandemConfig, router_id: str) -> "Traces | None":
    """Return where records go when their requests have ended, None if nothing traces them."""
    if config.tracing.endpoint is None:
        return None
    # Only who traces pays for the SDK.
    from router.traces import open_traces

    return open_traces(config.tracing.endpoint, config, router_id)


class WithoutRequestId:
    """Leaves the `x-request-id` of a response to Serve, which adds the same one to each."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                name = REQUEST_ID_HEADER.encode()
                kept = [header for header in message["headers"] if header[0] != name]
                message = {**message, "headers": kept}
            await send(message)

        await self._app(scope, receive, pass_on)


def router_application(
    config: TandemConfig,
    env: Mapping[str, str],
    start_controller: Callable[[], Any],
    pages: Pages,
    bind_host: str | None = None,
    revision: float = 0.0,
) -> Any:
    """Return the Serve application that runs the configured number of routers.

    `start_controller` returns the deployment's controller actor, started if there is none. One
    that is there already goes by `config` if its `revision` is later and its workers fit.
    `pages` are served as they are. Routers show their metrics on `bind_host`, or each on its
    node's address if that is None.
    """
    deployment = serve.deployment(
        name="router",
        num_replicas=config.router.replicas,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=config.cluster.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        # CUDA_VISIBLE_DEVICES: the front-end only needs a tokenizer, never the accelerator.
        ray_actor_options={
            "num_cpus": 0,
            "resources": config.router.resources,
            "runtime_env": {"env_vars": {**env, "CUDA_VISIBLE_DEVICES": ""}},
        },
    )
    router = deployment(serve.ingress()(RouterReplica))
    return router.bind(InForce(config, revision), start_controller, pages, bind_host)
