"""The whole HTTP surface on loopback: uvicorn, the exchange layer, vLLM's app, a fake flow."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import uvicorn
from tokenizers import Tokenizer

from cluster import config
from cluster.config import ModelSection, RouterSection
from router.surface import Operations, build_surface
from tests.integration.router.fake_flow import FakeFlow

MODEL = "tandem-tiny"
ANSWER = "And it came to pass in those days, that the king went out."
MAX_BODY_BYTES = RouterSection().max_body_bytes
MAX_MODEL_LEN = 512
MAX_SEQUENCES = 8


@dataclass
class Endpoint:
    """A running endpoint and what tests need to steer it."""

    url: str
    flow: FakeFlow
    tokenizer: Tokenizer
    health: tuple[bool, str] = (True, "ok")

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=20, **options)  # type: ignore[arg-type]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)

    def wait(self, is_true: Callable[[], bool], within_s: float = 1.0) -> None:
        """Wait for the server's thread; fail if it takes longer than a client would accept."""
        deadline = time.monotonic() + within_s
        while not is_true():
            assert time.monotonic() < deadline, f"not within {within_s} s: {self.flow.endings}"
            time.sleep(0.005)


async def no_decisions(after: int, limit: int) -> list[dict[str, object]]:
    return []


async def no_targets() -> list[dict[str, object]]:
    return []


async def no_state() -> dict[str, object]:
    return {}


async def no_history(after: int) -> dict[str, object]:
    return {}


async def serve(endpoint: Endpoint, started: threading.Event, stop: threading.Event) -> None:
    """Run the endpoint until `stop`; its address is there once `started` is set."""
    # vLLM takes seconds to import, and other tests of this folder do without.
    from router.app import build_frontend

    model = ModelSection(
        path=str(config.BUNDLED_MODEL),
        served_name=MODEL,
        max_model_len=MAX_MODEL_LEN,
        frontend_args={
            "enable_prompt_tokens_details": True,
            "enable_auto_tool_choice": True,
            "tool_call_parser": "hermes",
        },
    )
    frontend = await build_frontend(model, endpoint.flow, MAX_SEQUENCES)
    flow = endpoint.flow
    operations = Operations(
        health=lambda: endpoint.health,
        record=lambda exchange_id: {"id": exchange_id} if exchange_id in flow.records else None,
        recent=lambda limit: [{"id": exchange_id} for exchange_id in flow.records][:limit],
        pinned=lambda: {"workers": {}, "open_reservations": 0},
        decisions=no_decisions,
        targets=no_targets,
        state=no_state,
        history=no_history,
    )
    section = RouterSection()
    app = build_surface({MODEL: frontend}, operations, flow.records.get, section, {})
    listening = socket.create_server(("127.0.0.1", 0))
    # asyncio sets this only on sockets it has made; without it a response waits for an ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    endpoint.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    options = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(options)
    serving = asyncio.create_task(server.serve([listening]))
    started.set()
    await asyncio.to_thread(stop.wait)
    server.should_exit = True
    await serving
    frontend.state.engine_client.shutdown()
