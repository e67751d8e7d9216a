"""Files that the endpoint hands out as they are, with the headers that keep a page harmless."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# Nothing is loaded from, sent to or framed by anybody else, and no text becomes code.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for anew each time, and answered with 304 while nothing has changed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file's bytes and their media type."""

    body: bytes
    media_type: str


# By path on the endpoint.
Pages = Mapping[str, Page]


def page_routes(pages: Pages) -> list[Route]:
    """Return a route per page."""
    return [_route(path, page) for path, page in pages.items()]


def _route(path: str, page: Page) -> Route:
    tag = f'"{hashlib.sha256(page.body).hexdigest()[:24]}"'
    headers = {**_HEADERS, "etag": tag}

    async def answer(request: Request) -> Response:
        known = [each.strip() for each in request.headers.get("if-none-match", "").split(",")]
        if tag in known or f"W/{tag}" in known:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(page.body, headers=headers, media_type=page.media_type)

    return Route(path, answer)
