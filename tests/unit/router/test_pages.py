"""Pages as they are handed out: types, caching, and the headers that keep them harmless."""

import httpx
import pytest

from deploy.dashboard.pages import dashboard_pages
from router.pages import Page, Pages
from router.surface import operator_app
from tests.unit.router.test_surface import OPERATIONS


def endpoint(pages: Pages) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(operator_app(OPERATIONS, pages))
    return httpx.AsyncClient(transport=transport, base_url="http://tandem")


async def test_a_page_comes_with_its_type_and_a_policy_that_lets_nothing_else_in() -> None:
    async with endpoint({"/p": Page(b"<p>", "text/html; charset=utf-8")}) as client:
        answer = await client.get("/p")
    assert answer.content == b"<p>" and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
    assert not any(word in " ".join(policy) for word in ("unsafe", "http", "*", "data:"))
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_an_unchanged_page_is_not_sent_again() -> None:
    async with endpoint({"/p": Page(b"one", "text/css")}) as client:
        tag = (await client.get("/p")).headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = await client.get("/p", headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
        assert (await client.get("/p", headers={"if-none-match": '"other"'})).status_code == 200


async def test_a_page_can_only_be_read() -> None:
    async with endpoint({"/p": Page(b"one", "text/css")}) as client:
        assert (await client.post("/p")).status_code == 405
        assert (await client.head("/p")).status_code == 200


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/app.js", "/dashboard/theme.css"])
async def test_the_dashboard_is_among_them(path: str) -> None:
    async with endpoint(dashboard_pages()) as client:
        answer = await client.get(path)
    assert answer.status_code == 200 and answer.text


def test_the_dashboard_needs_nobody_else() -> None:
    pages = dashboard_pages()
    for path, page in pages.items():
        text = page.body.decode().replace("http://www.w3.org/", "")
        assert "://" not in text, path
        # What the server says must never be read as markup.
        assert "innerHTML" not in text and "insertAdjacent" not in text, path
