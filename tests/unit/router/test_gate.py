"""Which paths need which key, what a refusal says, and that the key goes no further."""

import httpx
import pytest

from router.api_keys import ApiKey, ApiKeys, KeyRole, digest_of
from router.exchange import Message, Receive, Scope, Send
from router.gate import ADMIN_PREFIXES, OPEN_PATHS, KeyGate
from router.surface import SERVED_PATHS, operator_app
from tests.unit.router.test_surface import OPERATIONS, PAGES, endpoint

ADMIN, CLIENT, SLOW = "admin-" + "a" * 40, "client-" + "c" * 40, "slow-" + "d" * 40
KEYS = ApiKeys(
    [
        ApiKey(name="ops", sha256=digest_of(ADMIN), role=KeyRole.ADMIN),
        ApiKey(name="app", sha256=digest_of(CLIENT)),
        ApiKey(name="slow", sha256=digest_of(SLOW), requests_per_minute=6, burst=1),
    ]
)


def gated(keys: ApiKeys = KEYS) -> httpx.AsyncClient:
    return endpoint("m", keys=lambda: keys)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("path", "without", "client", "admin"),
    [
        ("/health", 200, 200, 200),
        ("/metrics", 200, 200, 200),
        ("/dashboard", 200, 200, 200),
        ("/v1/models", 401, 200, 200),
        ("/version", 401, 200, 200),
        ("/admin/state", 401, 403, 200),
        ("/admin/requests", 401, 403, 200),
        ("/admin/targets", 401, 403, 200),
        ("/debug/pinned", 401, 403, 200),
        ("/nothing", 401, 404, 404),
    ],
)
async def test_what_opens_what(path: str, without: int, client: int, admin: int) -> None:
    async with gated() as http:
        for headers, status in (
            ({}, without),
            (bearer("wrong" * 8), 200 if without == 200 else 401),
            (bearer(CLIENT), client),
            ({"x-api-key": CLIENT}, client),
            (bearer(ADMIN), admin),
        ):
            assert (await http.get(path, headers=headers)).status_code == status, (path, headers)


def test_every_route_of_the_operator_is_either_open_or_the_admins() -> None:
    paths = {route.path for route in operator_app(OPERATIONS, PAGES).routes}  # type: ignore[attr-defined]
    assert {p for p in paths if not p.startswith(ADMIN_PREFIXES)} == OPEN_PATHS | PAGES.keys()
    assert not any(path.startswith(ADMIN_PREFIXES) for path in SERVED_PATHS)


async def test_refusals_are_shaped_as_clients_know_them() -> None:
    async with gated() as http:
        missing = await http.post("/v1/completions", json={})
        wrong = await http.post("/v1/completions", json={}, headers=bearer("w" * 40))
        theirs = await http.post("/v1/messages", json={}, headers={"x-api-key": "w" * 40})
        role = await http.get("/admin/state", headers=bearer(CLIENT))
    assert missing.headers["www-authenticate"] == "Bearer" and missing.headers["x-request-id"]
    for answer in (missing, wrong):
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("AuthenticationError", 401)
        assert "w" * 40 not in answer.text
    assert theirs.json()["type"] == "error"
    assert role.json()["error"]["type"] == "PermissionDeniedError"


async def test_a_key_over_its_rate_is_told_when_to_come_back() -> None:
    async with gated() as http:
        assert (await http.get("/v1/models", headers=bearer(SLOW))).status_code == 200
        over = await http.get("/v1/models", headers=bearer(SLOW))
        assert over.status_code == 429 and 1 <= int(over.headers["retry-after"]) <= 10
        assert over.json()["error"]["type"] == "RateLimitError"
        assert (await http.get("/v1/models", headers=bearer(CLIENT))).status_code == 200


async def test_a_browsers_preflight_needs_no_key() -> None:
    async with gated() as http:
        assert (await http.options("/v1/models")).status_code == 200
        assert (await http.options("/admin/state")).status_code == 401


async def test_the_key_goes_no_further_and_sockets_of_the_web_are_refused() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    gate = KeyGate(app, lambda: KEYS, SERVED_PATHS, (), 1)
    headers = [(b"authorization", f"Bearer {CLIENT}".encode()), (b"x-api-key", b"k"), (b"a", b"b")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await gate(scope, None, send)  # type: ignore[arg-type]
    assert seen[0]["headers"] == [(b"a", b"b")]
    await gate({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)  # type: ignore[arg-type]
    await gate({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
    assert [scope["type"] for scope in seen] == ["http", "lifespan"]
    assert sent.pop()["type"] == "websocket.close"
    for path in ("/dashboard/../admin/state", "//health", "/health/", "/DASHBOARD", ""):
        await gate({**scope, "path": path, "headers": []}, None, send)  # type: ignore[arg-type]
        assert sent[-2]["status"] == 401, path


async def test_a_key_that_is_dropped_is_refused_at_once() -> None:
    keys = [KEYS]
    async with endpoint("m", keys=lambda: keys[0]) as http:
        assert (await http.get("/v1/models", headers=bearer(CLIENT))).status_code == 200
        keys[0] = ApiKeys([ApiKey(name="ops", sha256=digest_of(ADMIN), role=KeyRole.ADMIN)])
        assert (await http.get("/v1/models", headers=bearer(CLIENT))).status_code == 401
