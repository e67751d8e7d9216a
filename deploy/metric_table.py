"""The table of docs/metrics.md, made from the declarations: `python -m deploy.metric_table`."""

from collections.abc import Iterator
from pathlib import Path

from cluster.metrics import DECLARED, Declaration
from cluster.names import Component

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_TITLES = {
    Component.ROUTER: "Routers",
    Component.WORKER: "Workers",
    Component.CONTROLLER: "Controller",
    Component.EVERY: "Every process",
}


def table() -> str:
    """Return the metrics as Markdown, a table per component."""
    return "\n".join(line for component in _TITLES for line in _section(component))


def _section(component: Component) -> Iterator[str]:
    yield f"\n### {_TITLES[component]}\n"
    yield "| Metric | Type | Unit | Labels | Meaning |"
    yield "|---|---|---|---|---|"
    yield from (_row(each) for each in DECLARED if each.component is component)


def _row(declared: Declaration) -> str:
    labels = ", ".join(f"`{label}`" for label in declared.labels)
    return f"| `{declared.name}` | {declared.kind} | {declared.unit} | {labels} | {declared.help} |"


def renewed(text: str) -> str:
    """Return the document with the table between its marks replaced by the present one."""
    before, _, rest = text.partition(_BEGIN)
    _, mark, after = rest.partition(_END)
    if not mark:
        raise ValueError(f"{DOCUMENT} lacks its marks: {_BEGIN} and {_END}")
    return f"{before}{_BEGIN}\n{table()}\n\n{_END}{after}"


def main() -> None:
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
