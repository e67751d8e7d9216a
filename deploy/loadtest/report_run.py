"""The page of one run. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from deploy.loadtest import figures, series
from deploy.loadtest.chart import (
    Axis,
    Chart,
    Line,
    Rule,
    draw,
    from_zero,
    spanning,
    time_axis,
)
from deploy.loadtest.markup import Html, el, join, table
from deploy.loadtest.report_parts import (
    FIGURES,
    LATENCIES,
    SPREAD,
    Run,
    bands,
    limit_near,
    objectives,
    section,
    settings,
    verdicts,
)

_MOST_FAULTS = 200
_NUM_SLOWEST = 10
_PERCENTS = (50, 90, 99)
_STYLE_OF_PERCENT = {50: 1, 90: 3, 99: 2}
_GOAL = 0.9


def one_run(run: Run) -> Html:
    """Return everything on the page."""
    return join(
        [
            el(
                "header",
                el("p", "Load test", class_="kicker"),
                el("h1", str(run["label"])),
                el("p", run["workload"]["spec"], class_="spec"),
                el("p", verdicts(run), class_="verdicts"),
            ),
            el("div", _tiles(run), class_="tiles"),
            _goodput(run),
            section("Over time", _time_charts(run), note=_time_note(run)),
            _phases(run),
            section("Latencies", _latency_table(run), el("div", _cdfs(run), class_="grid")),
            el(
                "div",
                section("Summary", _summary(run)),
                section("Settings", table(("setting", "value"), settings(run))),
                class_="pair",
            ),
            section("Lost, truncated and wrong", _faults(run)),
            section("Slowest first tokens", _slowest(run)),
        ]
    )


def _tiles(run: Run) -> list[Html]:
    summary = run["summary"]
    slo = summary["slo"]
    ttft, tpot = summary["ttft_s"] or {}, summary["tpot_s"] or {}
    shown = (
        (
            "Goodput",
            figures.rate(slo["goodput"]),
            f"of {figures.rate(summary['offered_rate'])} offered",
        ),
        ("SLO attainment", figures.percent(slo["attainment"]), objectives(run)),
        ("TTFT p99", figures.seconds(ttft.get("p99")), f"p50 {figures.seconds(ttft.get('p50'))}"),
        ("TPOT p99", figures.seconds(tpot.get("p99")), f"p50 {figures.seconds(tpot.get('p50'))}"),
        (
            "Output tokens",
            figures.rate(summary["output_token_rate"]),
            f"{figures.rate(summary['prompt_token_rate'])} in prompts",
        ),
        (
            "Completed",
            figures.number(summary["completed"]),
            f"of {figures.number(summary['requests'])} requests",
        ),
    )
    return [
        el("div", el("p", name), el("strong", value), el("small", below), class_="tile")
        for name, value, below in shown
    ]


def _time_note(run: Run) -> str:
    width = figures.tick_seconds(series.Grid.over(series.duration_s(run)).width_s)
    return (
        f"All on one axis, in bins of {width}; move over a plot, or focus it and use the arrow "
        "keys, to read every plot at that time."
    )


def _time_charts(run: Run) -> list[Html]:
    length_s = series.duration_s(run)
    charts = [_load_chart(run), _goodput_chart(run), _open_chart(run), _token_chart(run)]
    if run["pools"]:
        charts.append(_pool_chart(run, length_s))
    charts += (_latency_chart(run, name, title, length_s) for name, title in LATENCIES[:2])
    return [draw(chart) for chart in charts]


def over_time(
    run: Run, title: str, lines: Sequence[Line], unit: str = "", note: str = "", **more: Any
) -> Chart:
    """Return a chart from the run's start to its end, from 0 to what its lines reach."""
    values = [y for line in lines for _, y in line.points if y is not None]
    y = more.pop("y", None) or from_zero(values)
    return Chart(
        title,
        time_axis(series.duration_s(run)),
        y,
        lines,
        unit,
        note,
        bands=bands(run),
        is_over_time=True,
        **more,
    )


def _grid(run: Run) -> series.Grid:
    return series.Grid.over(series.duration_s(run))


def _load_chart(run: Run) -> Chart:
    grid = _grid(run)
    lines = [
        Line("offered", series.offered(run, grid), 4, is_stepped=True, is_filled=True),
        Line("served", series.served(run, grid), 1, is_stepped=True),
    ]
    return over_time(
        run,
        "Load",
        lines,
        "/s",
        "Requests per second by when they were due, and completed ones by when they ended.",
        are_bands_named=True,
    )


def _open_chart(run: Run) -> Chart:
    points = series.in_flight(run, _grid(run))
    y = from_zero([value for _, value in points if value is not None], is_whole=True)
    return over_time(run, "Requests open at once", [Line("open", points, 1, is_stepped=True)], y=y)


def _goodput_chart(run: Run) -> Chart:
    grid = _grid(run)
    lines = [
        Line("offered", series.offered(run, grid), 4, is_stepped=True, is_filled=True),
        Line("good", series.good(run, grid), 1, is_stepped=True),
    ]
    note = f"Requests per second that met the objectives ({objectives(run)}), by when they were due"
    return over_time(run, "Goodput", lines, "/s", f"{note}.")


def _token_chart(run: Run) -> Chart:
    points = series.output_tokens(run, _grid(run))
    lines = [Line("output tokens", points, 1, is_stepped=True, is_filled=True)]
    return over_time(run, "Output tokens per second", lines, "/s")


def _pool_chart(run: Run, length_s: float) -> Chart:
    lines = []
    for column, (name, style) in enumerate((("prefill", 2), ("decode", 1)), start=1):
        points = series.pool_sizes(run, column)
        if any(value is not None for _, value in points):
            last = [(length_s, points[-1][1])] if points[-1][0] < length_s else []
            lines.append(Line(name, [*points, *last], style, is_stepped=True))
    highest = [value for line in lines for _, value in line.points if value is not None]
    return over_time(run, "Workers ready", lines, y=from_zero(highest, is_whole=True))


def _latency_chart(run: Run, name: str, title: str, length_s: float) -> Chart:
    courses = series.percentiles(run, name, _PERCENTS, length_s)
    lines = [
        Line(f"p{percent}", points, _STYLE_OF_PERCENT[percent])
        for percent, points in zip(_PERCENTS, courses, strict=True)
    ]
    highest = max((y for line in lines for _, y in line.points if y is not None), default=0.0)
    limit, note = limit_near(run, name, highest)
    shown = highest if limit is None else max(highest, limit)
    found, stride = series.dots(run, name)
    return over_time(
        run,
        title,
        lines,
        "s",
        note,
        y=from_zero([shown * 1.02], figures.tick_seconds),
        rules=[] if limit is None else [Rule(limit, f"objective {figures.tick_seconds(limit)}")],
        dots=found,
        dots_name="each request" if stride == 1 else f"every {stride}th request",
    )


def _phases(run: Run) -> Html | None:
    if not run["phases"]:
        return None
    rows = []
    for phase in run["phases"]:
        summary = phase["summary"]
        slo, ttft, tpot = summary["slo"], summary["ttft_s"] or {}, summary["tpot_s"] or {}
        rows.append(
            (
                phase["name"],
                figures.clock(round(phase["begin_s"], 1)),
                figures.number(summary["requests"]),
                figures.rate(summary["offered_rate"]),
                figures.rate(slo["goodput"]),
                figures.percent(slo["attainment"]),
                *(figures.seconds(ttft.get(key)) for key in ("p50", "p99")),
                *(figures.seconds(tpot.get(key)) for key in ("p50", "p99")),
                figures.rate(summary["output_token_rate"]),
                _failures(summary),
            )
        )
    head = (
        *("phase", "from", "requests", "offered", "goodput", "attainment", "TTFT p50", "p99"),
        *("TPOT p50", "p99", "output tokens", "lost, truncated, wrong"),
    )
    return section("Phases", table(head, rows))


def _failures(summary: Any) -> str:
    return " / ".join(str(summary[key]) for key in ("lost", "truncated", "wrong"))


def _latency_table(run: Run) -> Html:
    rows = []
    for name, title in LATENCIES:
        spread = run["summary"][name] or {}
        rows.append((title, *(figures.seconds(spread.get(key)) for key in SPREAD)))
    return table(("of completed requests", *SPREAD), rows)


def cdf_axes(courses: Iterable[series.Points], write: Any) -> tuple[Axis, Axis]:
    """Return the axes of distributions: values logarithmic, shares from 0 to 1."""
    values = [x for points in courses for x, _ in points]
    shares = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 0.9, 1.0), figures.tick_percent)
    return spanning(values, write), shares


def _cdfs(run: Run) -> list[Html]:
    drawn = []
    for name, title in LATENCIES[:4]:
        points = series.cdf(series.latencies(run, name))
        if points:
            limit, note = limit_near(run, name, points[-1][0])
            marks = [] if limit is None else [Rule(limit, "objective", is_vertical=True)]
            x, y = cdf_axes([points, [(mark.value, None) for mark in marks]], figures.tick_seconds)
            chart = Chart(title, x, y, [Line("requests", points, 1)], "%", note, rules=marks)
            drawn.append(draw(chart))
    drawn += (_scheduling_chart(run), _length_chart(run))
    return drawn


def _scheduling_chart(run: Run) -> Html:
    points = series.cdf(series.latencies(run, "late_s"))
    limit = run["scheduling"]["limit_s"]
    x, y = cdf_axes([points, [(limit, None)]], figures.tick_seconds)
    note = "How much later than due requests left: the client's own error."
    lines = [Line("requests", points, 1)] if points else []
    rules = [Rule(limit, "limit", is_vertical=True)]
    return draw(Chart("Scheduling error", x, y, lines, "%", note, rules=rules))


def _length_chart(run: Run) -> Html:
    courses = [series.cdf(series.lengths(run, name)) for name in ("prompt_tokens", "output_tokens")]
    x, y = cdf_axes(courses, figures.tick)
    lines = [
        Line(name, points, style)
        for name, points, style in zip(("prompts", "answers"), courses, (1, 2), strict=True)
        if points
    ]
    return draw(Chart("Tokens asked for", x, y, lines, "%", x_unit=""))


def _summary(run: Run) -> Html:
    rows = [(figure.name, figure.write(figure.of(run["summary"]))) for figure in FIGURES]
    timing = run["scheduling"]
    rows += [
        (f"Scheduling error, {key}", figures.seconds(timing[f"{key}_s"]))
        for key in ("p50", "p99", "max")
    ]
    known = [row for row in rows if row[1] != figures.NOTHING]
    return table(("figure", "value"), known)


def faults_table(lines: Sequence[str]) -> Html:
    """Return the first faults as they are, and how many more there are."""
    rows = [(str(number), line) for number, line in enumerate(lines[:_MOST_FAULTS], start=1)]
    more = len(lines) - len(rows)
    left = el("p", f"and {more:,} more in the run document", class_="note") if more else None
    return join([table(("", "what"), rows), left])


def _faults(run: Run) -> Html:
    if not run["faults"]:
        return el("p", "Nothing: every request was answered in full.")
    return faults_table(run["faults"])


def _slowest(run: Run) -> Html:
    reached = [r for r in run["requests"] if r["ttft_s"] is not None]
    reached.sort(key=lambda request: -request["ttft_s"])
    rows = [
        (
            f"#{request['index']}",
            request["phase"] or figures.NOTHING,
            figures.clock(round(request["scheduled_s"], 2)),
            figures.seconds(request["ttft_s"]),
            figures.seconds(request["tpot_s"]),
            figures.seconds(request["e2e_s"]),
            figures.number(request["prompt_tokens"]),
            f"{request['received_tokens']:,} of {request['output_tokens']:,}",
            str(request["outcome"]),
            str(request["id"] or figures.NOTHING),
        )
        for request in reached[:_NUM_SLOWEST]
    ]
    head = ("request", "phase", "due", "TTFT", "TPOT", "end to end", "prompt", "answer")
    return table((*head, "outcome", "id at the endpoint"), rows)


def _goodput(run: Run) -> Html | None:
    """Return the search for the highest rate that holds the objectives, if there was one."""
    probes = run.get("probes")
    if not probes:
        return None
    points: series.Points = sorted((each["rate"], each["attainment"]) for each in probes)
    x = from_zero([rate for rate, _ in points])
    y = Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, _GOAL, 1.0), figures.tick_percent)
    rules = [Rule(_GOAL, "90 % of requests")]
    title = "Attainment against requests per second"
    chart = Chart(
        title, x, y, [Line("probes", points, 1)], "%", rules=rules, dots=points, x_unit="/s"
    )
    rows = [
        (
            str(number),
            figures.rate(float(each["rate"])),
            figures.number(each["requests"]),
            figures.percent(each["attainment"]),
            f"{figures.percent(each['low'])} to {figures.percent(each['high'])}",
            str(each["verdict"]),
        )
        for number, each in enumerate(probes, start=1)
    ]
    head = ("probe", "rate", "requests", "attainment", "confidence", "verdict")
    found = run.get("goodput") or {}
    sentence = f"Highest rate that holds: {figures.rate(found.get('rate'))}. {found.get('why', '')}"
    return section("Search for goodput", el("p", sentence), draw(chart), table(head, rows))
