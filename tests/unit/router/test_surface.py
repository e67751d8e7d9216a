"""Which app answers which path, and what the operator's routes say."""

import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from cluster import metrics
from cluster.config import RouterSection
from cluster.errors import Unavailable
from router.api_keys import ApiKeys
from router.dispatch import ModelDispatch
from router.exchange import AsgiApp, Receive, Scope, Send
from router.pages import Page
from router.surface import Operations, build_surface

RECORDS: dict[str, dict[str, object]] = {name: {"id": name} for name in ("first", "second")}


async def decisions(after: int, limit: int) -> list[dict[str, object]]:
    page: list[dict[str, object]] = [{"seq": seq} for seq in range(after + 1, 6)]
    return page[:limit]


async def state() -> dict[str, object]:
    return {"name": "tandem"}


async def history(after: int) -> dict[str, object]:
    return {"rows": [], "next": after}


async def no_controller(after: int, limit: int) -> list[dict[str, object]]:
    raise Unavailable("the controller does not answer")


async def targets() -> list[dict[str, object]]:
    return [{"targets": ["127.0.0.1:1"], "labels": {"component": "router"}}]


PAGES = {"/dashboard": Page(b"<!doctype html>", "text/html; charset=utf-8")}
OPERATIONS = Operations(
    health=lambda: (True, "serving"),
    record=RECORDS.get,
    recent=lambda limit: list(RECORDS.values())[:limit],
    pinned=lambda: {"open_reservations": 3},
    decisions=decisions,
    targets=targets,
    state=state,
    history=history,
)


def frontend(name: str) -> AsgiApp:
    """Stands for a model's app: lists its model, and tells who was asked what."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        answer: dict[str, object] = {"by": name, "body": body.decode()}
        if scope["method"] == "GET":
            answer = {"object": "list", "data": [{"id": name}]}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    return app


def endpoint(
    *names: str,
    operations: Operations = OPERATIONS,
    keys: Callable[[], ApiKeys] | None = None,
) -> httpx.AsyncClient:
    frontends = {name: frontend(name) for name in names}
    app = build_surface(frontends, operations, lambda _: None, RouterSection(), PAGES, keys)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tandem")


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/health", 200, {"healthy": True, "reason": "serving"}),
        ("/admin/requests/first", 200, {"id": "first"}),
        ("/admin/requests", 200, {"requests": [{"id": "first"}, {"id": "second"}]}),
        ("/admin/requests?limit=1", 200, {"requests": [{"id": "first"}]}),
        ("/debug/pinned", 200, {"open_reservations": 3}),
        ("/admin/decisions?after=3", 200, {"decisions": [{"seq": 4}, {"seq": 5}], "next": 5}),
        ("/admin/decisions?after=1&limit=1", 200, {"decisions": [{"seq": 2}], "next": 2}),
        ("/admin/decisions?after=9", 200, {"decisions": [], "next": 9}),
        ("/admin/state", 200, {"name": "tandem"}),
        ("/admin/history?after=1800000000", 200, {"rows": [], "next": 1_800_000_000}),
        ("/v1/models", 200, {"object": "list", "data": [{"id": "a"}]}),
    ],
)
async def test_answers(path: str, status: int, answer: object) -> None:
    async with endpoint("a") as client:
        response = await client.get(path)
    assert (response.status_code, response.json()) == (status, answer)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nowhere", 404),
        ("/admin/requests/third", 404),
        ("/admin/requests?limit=0", 400),
        ("/admin/requests?limit=many", 400),
        ("/admin/requests?limit=" + "9" * 5000, 400),
        ("/admin/decisions?limit=0", 400),
        ("/admin/decisions?limit=1001", 400),
        ("/admin/decisions?after=-1", 400),
        ("/admin/decisions?after=٣", 400),
        ("/admin/decisions?after=", 400),
        ("/admin/decisions?after=" + "9" * 5000, 400),
        ("/admin/history?after=x", 400),
    ],
)
async def test_refusals_are_openai_style(path: str, status: int) -> None:
    async with endpoint("a") as client:
        response = await client.get(path)
    assert response.status_code == response.json()["error"]["code"] == status
    assert response.headers["x-request-id"]


async def test_wrong_method() -> None:
    async with endpoint("a") as client:
        response = await client.post("/health")
    assert response.status_code == response.json()["error"]["code"] == 405
    assert "GET" in response.headers["allow"]


async def test_sick_deployment() -> None:
    sick = replace(OPERATIONS, health=lambda: (False, "no decode worker"))
    async with endpoint("a", operations=sick) as client:
        response = await client.get("/health")
    assert response.status_code == 503
    assert response.json() == {"healthy": False, "reason": "no decode worker"}


async def test_decisions_without_a_controller_are_503() -> None:
    async with endpoint("a", operations=replace(OPERATIONS, decisions=no_controller)) as client:
        response = await client.get("/admin/decisions")
    assert response.status_code == response.json()["error"]["code"] == 503
    assert response.json()["error"]["message"] == "the controller does not answer"
    assert response.headers["retry-after"] == "1"


async def test_metrics_are_this_process_s() -> None:
    async with endpoint("a") as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "tandem_requests_total" in response.text, metrics.REQUESTS
    assert "tandem_pinned_blocks" not in response.text, "a worker's"


async def test_targets_are_what_prometheus_discovers() -> None:
    async with endpoint("a") as client:
        response = await client.get("/admin/targets")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == await targets()


@pytest.mark.parametrize(
    ("content", "by"),
    [
        (b'{"model": "b", "x": 1}', "b"),
        (b'{"model": "a"}', "a"),
        (b'{"model": "unknown"}', "a"),
        (b'{"model": 7}', "a"),
        (b"[1]", "a"),
        (b"not JSON", "a"),
        (b"[" * 100_000, "a"),
    ],
)
async def test_models_go_by_the_body(content: bytes, by: str) -> None:
    async with endpoint("a", "b") as client:
        response = await client.post("/v1/completions", content=content)
    assert response.json() == {"by": by, "body": content.decode()}


async def test_models_of_all_front_ends_are_listed() -> None:
    async with endpoint("a", "b") as client:
        response = await client.get("/v1/models")
        version = await client.get("/version")
    assert [model["id"] for model in response.json()["data"]] == ["a", "b"]
    assert version.status_code == 200


def test_no_model_is_no_endpoint() -> None:
    with pytest.raises(ValueError, match="at least one model"):
        ModelDispatch({})
