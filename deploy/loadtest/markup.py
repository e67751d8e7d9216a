"""HTML as nested calls; every text is escaped unless it is `Html` already. Pure."""

from collections.abc import Iterable
from html import escape


class Html(str):
    """Text that is markup: not escaped again."""

    __slots__ = ()


Child = str | Iterable["Child"] | None

_VOID = {"meta", "br", "hr", "col"}


def el(tag: str, /, *children: Child, **attributes: object) -> Html:
    """Return an element; `class_` stands for class, `_` in other names for `-`, None for none."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Return the children one after the other, texts escaped and None left out."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(escape(child, quote=False))
        elif child is not None:
            parts.append(str(join(child)))
    return Html("".join(parts))


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str = "") -> Html:
    """Return a table that scrolls by itself where the page is narrow; first cells are headings.

    A cell that is an element of its own (`td`, `th`) is taken as it is.
    """
    body = [el("tr", (_cell(cell, not index) for index, cell in enumerate(row))) for row in rows]
    header = el("thead", el("tr", (el("th", cell, scope="col") for cell in head)))
    title = el("caption", caption) if caption else None
    return el("div", el("table", title, header, el("tbody", body)), class_="scroll", tabindex=0)


def _cell(cell: Child, is_first: bool) -> Html:
    if isinstance(cell, Html) and cell.startswith(("<td", "<th ")):
        return cell
    return el("th", cell, scope="row") if is_first else el("td", cell)
