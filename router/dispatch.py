"""One front-end per model behind one endpoint: requests go by the `model` in their body."""

import json
from collections.abc import Mapping
from typing import Any

from router.exchange import AsgiApp, Message, Receive, Scope, Send


class ModelDispatch:
    """Routes to the front-end named by the body's `model`.

    A name nobody serves, a body without one and a body that is not JSON go to the first
    front-end, whose answer is vLLM's own. With a single model the body is not read here.
    """

    def __init__(self, frontends: Mapping[str, AsgiApp]) -> None:
        if not frontends:
            raise ValueError("at least one model must be served")
        self._frontends = dict(frontends)
        self._first = next(iter(self._frontends.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._frontends) == 1:
            await self._first(scope, receive, send)
        elif scope["method"] == "POST":
            await self._by_body(scope, receive, send)
        elif scope["path"] == "/v1/models":
            await self._list_models(scope, send)
        else:
            await self._first(scope, receive, send)

    async def _by_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[Message] = []
        while not parts or parts[-1].get("more_body", False):
            parts.append(await receive())
        body = b"".join(part.get("body", b"") for part in parts)
        frontend = self._frontends.get(_model_in(body), self._first)

        async def replay() -> Message:
            return parts.pop(0) if parts else await receive()

        await frontend(scope, replay, send)

    async def _list_models(self, scope: Scope, send: Send) -> None:
        listing: dict[str, Any] = {"object": "list", "data": []}
        for frontend in self._frontends.values():
            listing["data"] += (await _answer(frontend, scope))["data"]
        body = json.dumps(listing).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _model_in(body: bytes) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    name = document.get("model") if isinstance(document, dict) else None
    return name if isinstance(name, str) else ""


async def _answer(app: AsgiApp, scope: Scope) -> Any:
    """Return the JSON `app` answers this request with, its body left out."""
    chunks: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        chunks.append(message.get("body", b""))

    await app(dict(scope), receive, send)
    return json.loads(b"".join(chunks))
