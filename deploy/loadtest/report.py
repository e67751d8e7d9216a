"""The report of a load test as one HTML file that needs nothing else: no server, no network.

One run is shown in full; several are compared, the first one being the measure of the others.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from deploy.loadtest.markup import Html, el, join
from deploy.loadtest.report_comparison import comparison
from deploy.loadtest.report_run import one_run
from deploy.loadtest.words import FORMAT

_HERE = Path(__file__).parent


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of one run document, or of the comparison of several.

    Raises:
        ConfigError: there is none, or one is not a run document of this format.
    """
    for run in runs:
        if run.get("format") != FORMAT:
            raise ConfigError(
                f"format {run.get('format')!r}, expected {FORMAT!r}: give documents that "
                "`tandem loadtest` has written"
            )
    if not runs:
        raise ConfigError("no runs to report on: give at least one run document")
    names = " / ".join(str(run["label"]) for run in runs)
    content = one_run(runs[0]) if len(runs) == 1 else comparison(runs)
    return "<!doctype html>\n" + el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("title", f"Load test: {names}"),
            el("style", Html(_asset("report.css"))),
        ),
        el("body", el("main", content), el("script", Html(_asset("report.js")))),
        lang="en",
    )


@cache
def _asset(name: str) -> str:
    """Return a file that the page carries in itself; nothing in it may close the element."""
    text = (_HERE / name).read_text("utf-8")
    assert "</" not in text, name
    return join([Html(text)])
