"""The dashboard of an endpoint with keys: it asks whoever looks, and keeps a key in its tab."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from playwright.sync_api import expect

from cluster.config import RouterSection
from deploy.dashboard.pages import dashboard_pages
from router.api_keys import ApiKey, ApiKeys, KeyRole, digest_of
from router.surface import build_surface
from tests.integration.deploy.browser import chromium
from tests.unit.router.test_surface import OPERATIONS, frontend

ADMIN, CLIENT = "admin-" + "a" * 40, "client-" + "c" * 40
KEYS = ApiKeys(
    [
        ApiKey(name="ops", sha256=digest_of(ADMIN), role=KeyRole.ADMIN),
        ApiKey(name="app", sha256=digest_of(CLIENT)),
    ]
)


@pytest.fixture
def url() -> Iterator[str]:
    surface = build_surface(
        {"m": frontend("m")},
        OPERATIONS,
        lambda _: None,
        RouterSection(),
        dashboard_pages(),
        lambda: KEYS,
    )
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(surface, log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_it_asks_for_a_key_and_goes_on_with_it(url: str) -> None:
    with chromium() as browser, browser.new_context() as context:
        page = context.new_page()
        sent: list[str | None] = []
        page.on("request", lambda request: sent.append(request.headers.get("authorization")))
        page.goto(f"{url}/dashboard")
        form, field = page.locator("#key"), page.locator("#key-text")
        expect(form).to_be_visible()
        expect(form).to_contain_text("no API key")
        expect(field).to_be_focused()
        expect(page.locator("#banner")).to_be_hidden()
        for key, says in (("wrong", "incorrect API key"), (CLIENT, "role admin")):
            field.fill(key)
            field.press("Enter")
            expect(form).to_contain_text(says)
        num_before = len(sent)
        page.wait_for_timeout(1500)
        assert len(sent) == num_before, "nothing is asked until there is another key"
        field.fill(ADMIN)
        field.press("Enter")
        expect(form).to_be_hidden()
        assert f"Bearer {ADMIN}" in sent
        assert page.evaluate("localStorage.length") == 0
        assert ADMIN not in page.content() and ADMIN not in page.url
