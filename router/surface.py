"""The endpoint's routes: the models' ones go to vLLM's apps, the operator's ones are here."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.config import RouterSection
from cluster.errors import TandemError
from cluster.exporter import exported
from cluster.names import Component
from router.api_keys import ApiKeys
from router.dispatch import ModelDispatch
from router.exchange import AsgiApp, ExchangeLayer, Placed, Receive, Scope, Send
from router.gate import KeyGate
from router.http_errors import HttpFailure, failure_of
from router.pages import Pages, page_routes

# vLLM's other routes drive an engine (sleep, scale, profile, LoRA, abort by id) or a cloud.
SERVED_PATHS = frozenset(
    {
        "/v1/models",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/inference/v1/generate",
        "/tokenize",
        "/detokenize",
        "/version",
    }
)
_DEFAULT_RECENT = 100
_MAX_RECENT = 10_000
# A decision with all it rests on is about 2 KB.
_MAX_DECISIONS = 1000
_MAX_SEQ = 999_999_999
# Unix seconds.
_MAX_TIME = 99_999_999_999

Document = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Operations:
    """What the operator's routes show; each is read afresh per call and must not block.

    The coroutines ask the controller, so they take time and may raise `TandemError`.
    """

    health: Callable[[], tuple[bool, str]]
    record: Callable[[str], Document | None]
    recent: Callable[[int], Sequence[Document]]
    pinned: Callable[[], Document]
    decisions: Callable[[int, int], Awaitable[Sequence[Document]]]
    targets: Callable[[], Awaitable[Sequence[Document]]]
    state: Callable[[], Awaitable[Document]]
    history: Callable[[int], Awaitable[Document]]


def build_surface(
    frontends: Mapping[str, AsgiApp],
    operations: Operations,
    record_of: Callable[[str], Placed | None],
    config: RouterSection,
    pages: Pages,
    keys: Callable[[], ApiKeys] | None = None,
) -> ExchangeLayer:
    """Return the whole HTTP endpoint over one front-end per model name.

    `keys` returns the API keys in force; without it nobody needs one.
    """
    surface: AsgiApp = Surface(ModelDispatch(frontends), operator_app(operations, pages))
    if keys is not None:
        surface = KeyGate(surface, keys, SERVED_PATHS, pages, config.replicas)
    return ExchangeLayer(surface, record_of, config.max_body_bytes)


class Surface:
    """Sends each request to the models or to the operator's routes, which own the 404 too."""

    def __init__(self, models: AsgiApp, operator: AsgiApp) -> None:
        self._models = models
        self._operator = operator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_for_models = scope["type"] == "http" and scope["path"] in SERVED_PATHS
        await (self._models if is_for_models else self._operator)(scope, receive, send)


def operator_app(operations: Operations, pages: Pages) -> Starlette:
    """Return the routes for people and machines that look after the deployment, `pages` included.

    They are coroutines so that they read the router's state in its own thread.
    """

    shown = exported(Component.ROUTER)

    async def health(_request: Request) -> Response:
        is_healthy, reason = operations.health()
        status = HTTPStatus.OK if is_healthy else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"healthy": is_healthy, "reason": reason}, status)

    async def record(request: Request) -> Response:
        exchange_id = request.path_params["exchange_id"]
        document = operations.record(exchange_id)
        if document is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no record of request {exchange_id}")
        return JSONResponse(document)

    async def recent(request: Request) -> Response:
        limit = _number(request, "limit", _DEFAULT_RECENT, (1, _MAX_RECENT))
        return JSONResponse({"requests": list(operations.recent(limit))})

    async def decisions(request: Request) -> Response:
        after = _number(request, "after", 0, (0, _MAX_SEQ))
        limit = _number(request, "limit", _DEFAULT_RECENT, (1, _MAX_DECISIONS))
        page = list(await operations.decisions(after, limit))
        return JSONResponse({"decisions": page, "next": page[-1]["seq"] if page else after})

    async def targets(_request: Request) -> Response:
        return JSONResponse(list(await operations.targets()))

    async def state(_request: Request) -> Response:
        return JSONResponse(await operations.state())

    async def history(request: Request) -> Response:
        return JSONResponse(await operations.history(_number(request, "after", 0, (0, _MAX_TIME))))

    async def pinned(_request: Request) -> Response:
        return JSONResponse(operations.pinned())

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(shown), media_type=CONTENT_TYPE_LATEST)

    routes = {
        "/health": health,
        "/metrics": metrics,
        "/admin/decisions": decisions,
        "/admin/history": history,
        "/admin/requests": recent,
        "/admin/requests/{exchange_id}": record,
        "/admin/targets": targets,
        "/admin/state": state,
        "/debug/pinned": pinned,
    }
    return Starlette(
        routes=[*(Route(path, route) for path, route in routes.items()), *page_routes(pages)],
        exception_handlers={HTTPException: _not_served, TandemError: _failed},
    )


def _number(request: Request, name: str, default: int, bounds: tuple[int, int]) -> int:
    """Return a number of the query; raise a 400 that says what it may be."""
    text = request.query_params.get(name, str(default))
    # Python refuses to read numbers of thousands of digits, with an error of its own.
    is_short = text.isascii() and text.isdecimal() and len(text) <= len(str(bounds[1]))
    if not is_short or not bounds[0] <= int(text) <= bounds[1]:
        message = f"{name} must be a number from {bounds[0]} to {bounds[1]}"
        raise HTTPException(HTTPStatus.BAD_REQUEST, message)
    return int(text)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    failure = HttpFailure(status, status.phrase, f"{request.url.path}: {error.detail}")
    headers = {"content-type": "application/json", **(error.headers or {})}
    return Response(failure.body(), status, headers)


async def _failed(_request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    failure = failure_of(error)
    headers = {name.decode(): value.decode() for name, value in failure.headers()}
    return Response(failure.body(), failure.status, headers)
