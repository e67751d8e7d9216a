"""The report's page: well-formed, self-contained, escaped, and right about what it shows."""

from html.parser import HTMLParser

import pytest

from cluster.errors import ConfigError
from deploy.loadtest import figures, series
from deploy.loadtest.markup import Html, el, join
from deploy.loadtest.report import page
from tests.run_documents import run_document

EVIL = '<script>alert("x")</script> & "quoted"'
PHASES = {"warm-up": (0.0, 3.0), "main": (3.0, 30.0)}


class Outline(HTMLParser):
    """Checks that elements close in order; collects texts, tables and what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.loaded += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    def has(self, text: str) -> bool:
        return any(text in each for each in self.texts)


def test_a_run_is_one_well_formed_page_without_anything_from_outside() -> None:
    text = page([run_document(phases=PHASES)])
    outline = Outline(text)
    assert not outline.loaded
    assert "http-equiv" not in text
    assert outline.names.count("script") == outline.names.count("style") == 1
    assert outline.names.count("figure") == 13
    for title in ("Over time", "Phases", "Latencies", "Summary", "Settings", "warm-up", "Goodput"):
        assert outline.has(title), title
    assert outline.has("Nothing: every request was answered in full.")


def test_every_text_is_escaped() -> None:
    run = run_document(EVIL, faults=[EVIL], phases={EVIL: (0.0, 5.0), "main": (5.0, 9.0)})
    run["workload"]["spec"] = run["requests"][0]["id"] = EVIL
    for text in (page([run]), page([run, run])):
        outline = Outline(text)
        assert outline.names.count("script") == 1
        assert outline.has(EVIL)


def test_runs_are_compared_with_the_first() -> None:
    slow = run_document("slow", slots=2, faults=["request 3, at 1.0 s: lost: HTTP 503"])
    outline = Outline(page([run_document("fast"), slow]))
    first, second = (series.latencies(run, "ttft_s") for run in (run_document("fast"), slow))
    ratio = (sum(second) / len(second)) / (sum(first) / len(first))
    written = f"{ratio:.2f}x ▼" if ratio < 10 else f"{ratio:,.0f}x ▼"
    assert outline.has(written)
    assert outline.has("Lost, truncated and wrong: slow")
    assert not outline.has("The runs differ")
    other = run_document("other", seed=1)
    assert Outline(page([slow, other])).has("The runs differ in their workloads.")


def test_a_run_that_got_nowhere_still_has_a_page() -> None:
    run = run_document(state="broken", pools=[], phases=None)
    for request in run["requests"]:
        request.update(token_s=[], token_counts=[], received_tokens=0, met=False, outcome="lost")
        request.update(ttft_s=None, tpot_s=None, e2e_s=None, end_s=None)
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "normalised_s", "worker_seconds"):
        run["summary"][name] = None
    assert Outline(page([run])).has("run broken")
    empty = run_document(requests=[], pools=[], summary=run["summary"])
    assert Outline(page([empty, run])).has("run complete")


def test_a_search_for_goodput_is_shown() -> None:
    probe = {"requests": 50, "low": 0.8, "high": 1.0, "verdict": "met", "summary": {}}
    run = run_document(probes=[{**probe, "rate": 2.0, "attainment": 0.96}])
    run["goodput"] = {"rate": 2.0, "bound": 2.0, "why": "the next one missed"}
    assert Outline(page([run])).has("Highest rate that holds: 2.00/s. the next one missed")


def test_what_is_no_run_document_is_refused() -> None:
    with pytest.raises(ConfigError, match="format 'other', expected"):
        page([{"format": "other"}])
    with pytest.raises(ConfigError, match="no runs"):
        page([])


def test_series_count_every_request_once() -> None:
    run = run_document()
    grid = series.Grid.over(series.duration_s(run))
    for take, total in ((series.offered, 40), (series.served, 40)):
        points = take(run, grid)
        assert sum(y or 0.0 for _, y in points[:-1]) * grid.width_s == pytest.approx(total)
    tokens = sum(request["received_tokens"] for request in run["requests"])
    points = series.output_tokens(run, grid)
    assert sum(y or 0.0 for _, y in points[:-1]) * grid.width_s == pytest.approx(tokens)
    assert max(y or 0.0 for _, y in series.in_flight(run, grid)) >= 4


def test_distributions_rise_to_one() -> None:
    points = series.cdf([float(value) for value in range(5000)])
    shares = [share or 0.0 for _, share in points]
    assert shares == sorted(shares)
    assert points[-1] == (4999.0, 1.0)
    assert (4949.0, 0.99) in points


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.seconds(0.0123), "12.3 ms"),
        (figures.seconds(0.99961), "1.00 s"),
        (figures.seconds(4.2e-7), "0.420 µs"),
        (figures.seconds(None), figures.NOTHING),
        (figures.number(12031), "12,031"),
        (figures.rate(5.534), "5.53/s"),
        (figures.percent(1.0), "100 %"),
        (figures.clock(3725), "1:02:05"),
        (figures.tick_seconds(0.5), "500 ms"),
        (str(el("p", "a < b", Html("<b>"), class_="x")), '<p class="x">a &lt; b<b></p>'),
        (str(join(["&", None, ["<"]])), "&amp;&lt;"),
    ],
)
def test_figures_and_markup(written: str, expected: str) -> None:
    assert written == expected
