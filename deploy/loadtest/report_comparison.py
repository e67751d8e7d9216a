"""The page that compares runs; the first one is what the others are measured by. Pure."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

from deploy.loadtest import figures, series
from deploy.loadtest.chart import Band, Chart, Line, Rule, draw, from_zero, sample, time_axis
from deploy.loadtest.markup import Html, el, join, table
from deploy.loadtest.report_parts import (
    FIGURES,
    LATENCIES,
    SPREAD,
    Figure,
    Run,
    bands,
    limit_near,
    section,
    settings,
    verdicts,
)
from deploy.loadtest.report_run import cdf_axes, faults_table

_NUM_STYLES = 6
# Nearer than this to 1 a ratio says nothing.
_SAME = 0.01
# From here on ratios are written without decimals.
_COARSE_FROM = 10.0
# Differ between any two runs.
_ALWAYS_OTHER = {"Started", "Endpoint"}


def comparison(runs: Sequence[Run]) -> Html:
    """Return everything on the page."""
    names = labels(runs)
    return join(
        [
            el(
                "header",
                el("p", "Load test", class_="kicker"),
                el("h1", f"Comparison of {len(runs)} runs"),
                el("ul", _runs(runs, names), class_="runs"),
            ),
            _warning(runs),
            section("Figures", _figures(runs, names), note=_ratio_note(names[0])),
            section("Latencies", _latencies(runs, names), note=_ratio_note(names[0])),
            section("Distributions", el("div", _cdfs(runs, names), class_="grid")),
            section("Over time", _time_charts(runs, names)),
            _phases(runs, names),
            section("Settings", _settings(runs, names)),
            *(_faults(run, name) for run, name in zip(runs, names, strict=True)),
        ]
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the runs' labels, numbered where two have the same."""
    plain = [str(run["label"]) for run in runs]
    return [
        f"{label} ({number})" if plain.count(label) > 1 else label
        for number, label in enumerate(plain, start=1)
    ]


def _style(index: int) -> int:
    return index % _NUM_STYLES + 1


def _runs(runs: Sequence[Run], names: Sequence[str]) -> list[Html]:
    return [
        el(
            "li",
            el("h2", sample(_style(index)), " ", name),
            el("p", run["workload"]["spec"], class_="spec"),
            el("p", verdicts(run), class_="verdicts"),
        )
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _ratio_note(first: str) -> str:
    return (
        f"Behind each value its ratio to that of {first}: ▲ better, ▼ worse, = within 1 %, "
        "no sign where neither way is better."
    )


def _warning(runs: Sequence[Run]) -> Html | None:
    """Return what makes the runs hard to compare."""
    found = []
    for what, part, keys in (
        ("workloads", "workload", ("spec", "time_scale", "rate_scale", "length_scale", "seed")),
        ("objectives", "settings", ("slo_ttft_s", "slo_tpot_s")),
        ("ways of sending", "settings", ("mode", "concurrency")),
    ):
        if len({tuple(str(run[part][key]) for key in keys) for run in runs}) > 1:
            found.append(what)
    if not found:
        return None
    return el("p", f"⚠ The runs differ in their {' and '.join(found)}.", class_="warning")


def _value(figure: Figure, runs: Sequence[Run], index: int) -> Html:
    """Return a cell: the run's value and, but for the first run, its ratio and verdict."""
    value, first = (figure.of(run["summary"]) for run in (runs[index], runs[0]))
    written = figure.write(value)
    if index == 0 or value is None or first is None or value == first == 0:
        return el("td", written)
    if first == 0:
        sign, word = _verdict(math.inf, figure.better)
        return el("td", written, " ", el("span", sign, class_=f"ratio {word}"))
    ratio = value / first
    sign, word = _verdict(ratio, figure.better)
    text = f"{ratio:.2f}" if ratio < _COARSE_FROM else f"{ratio:,.0f}"
    return el("td", written, " ", el("span", f"{text}x {sign}", class_=f"ratio {word}"))


def _verdict(ratio: float, better: int) -> tuple[str, str]:
    if not better:
        return "", "plain"
    if abs(ratio - 1.0) <= _SAME:
        return "=", "plain"
    is_better = (ratio > 1.0) == (better > 0)
    return ("▲", "good") if is_better else ("▼", "bad")


def _figure_rows(figures_: Sequence[Figure], runs: Sequence[Run]) -> list[list[Html | str]]:
    return [
        [figure.name, *(_value(figure, runs, index) for index in range(len(runs)))]
        for figure in figures_
        if any(figure.of(run["summary"]) is not None for run in runs)
    ]


def _figures(runs: Sequence[Run], names: Sequence[str]) -> Html:
    timing = [figures.seconds(run["scheduling"]["p99_s"]) for run in runs]
    rows = [*_figure_rows(FIGURES, runs), ["Scheduling error p99", *timing]]
    return table(("figure", *names), rows)


def _latencies(runs: Sequence[Run], names: Sequence[str]) -> Html:
    wanted = [
        Figure(f"{title}, {key}", (name, key), figures.seconds, -1)
        for name, title in LATENCIES
        for key in SPREAD
        if key != "p95"
    ]
    return table(("of completed requests", *names), _figure_rows(wanted, runs))


def _cdfs(runs: Sequence[Run], names: Sequence[str]) -> list[Html]:
    drawn = []
    for name, title in LATENCIES[:4]:
        courses = [series.cdf(series.latencies(run, name)) for run in runs]
        if any(courses):
            highest = max(points[-1][0] for points in courses if points)
            limits = {limit_near(run, name, highest)[0] for run in runs} - {None}
            marks: series.Points = [(each, None) for each in limits if each is not None]
            x, y = cdf_axes([*courses, marks], figures.tick_seconds)
            rules = [Rule(limit, "objective", is_vertical=True) for limit, _ in marks]
            drawn.append(draw(Chart(title, x, y, _lines(names, courses), "%", rules=rules)))
    return drawn


def _lines(
    names: Sequence[str], courses: Sequence[series.Points], *, is_stepped: bool = False
) -> list[Line]:
    return [
        Line(name, points, _style(index), is_stepped=is_stepped)
        for index, (name, points) in enumerate(zip(names, courses, strict=True))
        if points
    ]


def _time_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Html]:
    length_s = max(map(series.duration_s, runs))
    steps: Sequence[tuple[str, str, Callable[[Run, series.Grid], series.Points]]] = (
        ("Completed requests per second", "/s", series.served),
        ("Goodput, requests per second", "/s", series.good),
        ("Output tokens per second", "/s", series.output_tokens),
        ("Requests open at once", "", series.in_flight),
    )
    charts = [
        _over_time(runs, title, _lines(names, series.each_run(runs, take), is_stepped=True), unit)
        for title, unit, take in steps
    ]
    for column, pool in ((1, "Prefill"), (2, "Decode")):
        courses = [series.pool_sizes(run, column) for run in runs]
        if any(y is not None for points in courses for _, y in points):
            lines = _lines(names, courses, is_stepped=True)
            charts.append(_over_time(runs, f"{pool} workers ready", lines, is_whole=True))
    for name, title in LATENCIES[:2]:
        for percent in (50, 99):
            courses = [series.percentiles(run, name, (percent,), length_s)[0] for run in runs]
            lines = _lines(names, courses)
            charts.append(_over_time(runs, f"{title}, p{percent}", lines, "s"))
    return [draw(chart) for chart in charts]


def _over_time(
    runs: Sequence[Run],
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    *,
    is_whole: bool = False,
) -> Chart:
    values = [y for line in lines for _, y in line.points if y is not None]
    write = figures.tick_seconds if unit == "s" else figures.tick
    return Chart(
        title,
        time_axis(max(map(series.duration_s, runs))),
        from_zero(values, write, is_whole=is_whole),
        lines,
        unit,
        bands=_common_bands(runs),
        is_over_time=True,
    )


def _common_bands(runs: Sequence[Run]) -> list[Band]:
    """Return the phases if all runs have the same, else none."""
    names = {tuple(phase["name"] for phase in run["phases"]) for run in runs}
    return bands(runs[0]) if len(names) == 1 else []


def _phases(runs: Sequence[Run], names: Sequence[str]) -> Html | None:
    """Return each phase's main figures side by side."""
    if not any(run["phases"] for run in runs):
        return None
    wanted = (
        Figure("TTFT p99", ("ttft_s", "p99"), figures.seconds, -1),
        Figure("TPOT p99", ("tpot_s", "p99"), figures.seconds, -1),
        Figure("attainment", ("slo", "attainment"), figures.percent, 1),
        Figure("goodput", ("slo", "goodput"), figures.rate, 1),
    )
    found = list(dict.fromkeys(phase["name"] for run in runs for phase in run["phases"]))
    rows = []
    for phase in found:
        views = [_phase_of(run, phase) for run in runs]
        rows += [[f"{phase}: {row[0]}", *row[1:]] for row in _figure_rows(wanted, views)]
    return section("Phases", table(("phase and figure", *names), rows))


def _phase_of(run: Run, name: str) -> Run:
    """Return the phase as if it were a run, of which only the summary is known."""
    return next((phase for phase in run["phases"] if phase["name"] == name), {"summary": {}})


def _settings(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Return the settings side by side, those that differ marked."""
    rows = []
    for entries in zip_longest(*(settings(run) for run in runs)):
        what, values = entries[0][0], [value for _, value in entries]
        is_other = what not in _ALWAYS_OTHER and len(set(values)) > 1
        rows.append([f"≠ {what}" if is_other else what, *values])
    return table(("setting (≠ differs)", *names), rows)


def _faults(run: Run, name: str) -> Html | None:
    if not run["faults"]:
        return None
    return section(f"Lost, truncated and wrong: {name}", faults_table(run["faults"]))
