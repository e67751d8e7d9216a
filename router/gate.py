"""Who gets in: the ASGI layer that asks for an API key, where keys are configured.

Everything needs a key but what `OPEN_PATHS` names and the dashboard's files, which hold no data.
A key is asked for before any of the body is read, and goes no further than here.
"""

import time
from collections.abc import Callable, Collection
from http import HTTPStatus

from cluster.metrics import KEYS_REFUSED
from router.api_keys import ApiKeys, KeyRole, presented_key
from router.exchange import AsgiApp, Receive, Scope, Send
from router.http_errors import HttpFailure
from router.rate_limit import RateLimits

# For load balancers and Prometheus, as every server of the field has them; neither names a
# prompt, a client or a key.
OPEN_PATHS = frozenset({"/health", "/metrics"})
ADMIN_PREFIXES = ("/admin", "/debug")
_KEY_HEADERS = (b"authorization", b"x-api-key")
_CAUSES = ("missing", "unknown", "role", "rate")


class KeyGate:
    """Passes on requests that bring a key in force and may do what they ask.

    `models` are the paths that a key's rate limits. `keys` is asked for every request, so that a
    key that was added or dropped counts at once.
    """

    def __init__(
        self,
        app: AsgiApp,
        keys: Callable[[], ApiKeys],
        models: Collection[str],
        open_paths: Collection[str],
        num_routers: int,
    ) -> None:
        self._app = app
        self._keys = keys
        self._models = models
        self._open_paths = OPEN_PATHS | set(open_paths)
        self._limits = RateLimits(num_routers)
        for cause in _CAUSES:
            KEYS_REFUSED.labels(cause)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = None if scope["type"] == "lifespan" else self._refusal(scope)
        if failure is None:
            await self._app(_without_key(scope), receive, send)
        elif scope["type"] == "http":
            await _refuse(failure, scope, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": failure.message})

    def _refusal(self, scope: Scope) -> HttpFailure | None:
        path = scope["path"]
        is_for_models = path in self._models
        is_preflight = scope.get("method") == "OPTIONS" and is_for_models
        if path in self._open_paths or is_preflight:
            return None
        presented = presented_key(scope["headers"])
        if presented is None:
            return _unauthorised("missing", "no API key: send it as Authorization: Bearer KEY")
        key = self._keys().find(presented)
        if key is None:
            return _unauthorised("unknown", "incorrect API key")
        if path.startswith(ADMIN_PREFIXES) and key.role is not KeyRole.ADMIN:
            KEYS_REFUSED.labels("role").inc()
            message = f"{path} is for keys of role admin; {key.name!r} is of role {key.role}"
            return HttpFailure(HTTPStatus.FORBIDDEN, "PermissionDeniedError", message)
        wait_s = self._limits.take(key, time.monotonic()) if is_for_models else None
        if wait_s is None:
            return None
        KEYS_REFUSED.labels("rate").inc()
        message = f"key {key.name!r} may make {key.requests_per_minute:g} requests per minute"
        status = HTTPStatus.TOO_MANY_REQUESTS
        return HttpFailure(status, "RateLimitError", message, retry_after_s=wait_s)


def _unauthorised(cause: str, message: str) -> HttpFailure:
    KEYS_REFUSED.labels(cause).inc()
    return HttpFailure(HTTPStatus.UNAUTHORIZED, "AuthenticationError", message)


def _without_key(scope: Scope) -> Scope:
    """Nothing behind the gate needs the key, and what is not there cannot be logged."""
    if "headers" not in scope:
        return scope
    headers = [each for each in scope["headers"] if each[0] not in _KEY_HEADERS]
    return {**scope, "headers": headers}


async def _refuse(failure: HttpFailure, scope: Scope, send: Send) -> None:
    body = failure.body(scope["path"])
    headers = [*failure.headers(), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": failure.status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
