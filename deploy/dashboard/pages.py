"""The dashboard's files as the router serves them."""

from pathlib import Path

from router.pages import Page, Pages

PATH = "/dashboard"
_FOLDER = Path(__file__).parent / "web"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def dashboard_pages() -> Pages:
    """Return every file of the page by its path; `/dashboard` itself is `index.html`."""
    pages: dict[str, Page] = {}
    for file in sorted(_FOLDER.rglob("*")):
        if file.suffix in _MEDIA_TYPES:
            path = f"{PATH}/{file.relative_to(_FOLDER).as_posix()}"
            pages[path] = Page(file.read_bytes(), _MEDIA_TYPES[file.suffix])
    pages[PATH] = pages.pop(f"{PATH}/index.html")
    return pages
