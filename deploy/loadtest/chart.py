"""Charts as HTML around one SVG: lines stretch with the page, texts keep their size. Pure.

The SVG's own units are thousandths of its width and height, whatever the width of the page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deploy.loadtest.figures import clock, decades, step, tick, time_step
from deploy.loadtest.markup import Html, el
from deploy.loadtest.series import Points

_SIZE = 1000.0
# The largest of the values, as a multiple of the smallest.
_LOGARITHMIC_FROM = 6.0
_NEAR_END = 0.96


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, with the `ticks` to write at, linear or logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value lies, 0 to 1; what is outside lies on the edge."""
        if self.is_log:
            low = math.log(self.low)
            share = (math.log(max(value, self.low)) - low) / (math.log(self.high) - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def from_zero(
    values: Sequence[float], write: Callable[[float], str] = tick, *, is_whole: bool = False
) -> Axis:
    """Return a linear axis from 0 to a round value that holds them all."""
    top = max(values, default=0.0) or 1.0
    apart = max(step(top, 4), 1.0 if is_whole else 0.0)
    count = max(1, math.ceil(top / apart - 1e-9))
    return Axis(0.0, apart * count, tuple(apart * index for index in range(count + 1)), write)


def time_axis(duration_s: float) -> Axis:
    apart = time_step(duration_s, 8)
    count = math.floor(duration_s / apart + 1e-9)
    return Axis(0.0, duration_s, tuple(apart * index for index in range(count + 1)), clock)


def spanning(values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """Return an axis over the positive values: logarithmic, unless they lie near each other.

    It reaches at most five decades below the largest.
    """
    high = max(values, default=1.0)
    high = high if high > 0 else 1e-6
    low = max(min((v for v in values if v > 0), default=high), high / 1e5)
    low, high = low / 1.08, high * 1.08
    if high / low >= _LOGARITHMIC_FROM:
        return Axis(low, high, tuple(decades(low, high)), write, is_log=True)
    apart = step(high - low, 8)
    first, last = math.ceil(low / apart), math.floor(high / apart)
    ticks = tuple(apart * index for index in range(first, last + 1))
    return Axis(low, high, ticks, write)


@dataclass(frozen=True, slots=True)
class Line:
    """A course with a name in the legend. `style` picks its colour and dashes, 1 to 6."""

    name: str
    points: Points
    style: int
    is_stepped: bool = False
    is_filled: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A dashed line at a value of the one axis or the other, with a text at its end."""

    value: float
    text: str
    is_vertical: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A part of the x axis that has a name."""

    begin: float
    end: float
    name: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What to draw.

    `unit` and `x_unit` are how the page's script writes values: s, /s, % or nothing.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    dots: Points = field(default_factory=list)
    dots_name: str = ""
    rules: Sequence[Rule] = ()
    bands: Sequence[Band] = ()
    are_bands_named: bool = False
    x_unit: str = "s"
    is_over_time: bool = False


def draw(chart: Chart) -> Html:
    """Return a figure: title and legend, then the plot between its axes."""
    return el(
        "figure",
        el("figcaption", el("h3", chart.title), _note(chart), _legend(chart)),
        el(
            "div",
            el("div", _y_labels(chart), class_="ys", aria_hidden="true"),
            el("div", _svg(chart), _rule_texts(chart), _cursor(), class_="area"),
            el("div", _x_labels(chart), class_="xs", aria_hidden="true"),
            class_="plot",
        ),
        class_="chart",
        data_unit=chart.unit,
        data_axis="time" if chart.is_over_time else "own",
        data_x_unit=chart.x_unit,
        data_x=_range(chart.x),
        data_y=_range(chart.y),
    )


def _note(chart: Chart) -> Html | None:
    return el("p", chart.note, class_="note") if chart.note else None


def _range(axis: Axis) -> str:
    return f"{axis.low:.9g} {axis.high:.9g} {'log' if axis.is_log else 'linear'}"


def _legend(chart: Chart) -> Html:
    keys = [
        el("li", sample(line.style), line.name, " ", el("output"), data_style=line.style)
        for line in chart.lines
    ]
    if chart.dots_name:
        keys.append(el("li", el("i", class_="dot"), chart.dots_name))
    return el("ul", keys, el("li", el("output", class_="at")), class_="legend")


def sample(style: int) -> Html:
    """Return a short piece of a line, for a legend."""
    line = el("path", d="M0 5H26", class_=f"line s{style}")
    return el("svg", line, class_="sample", viewBox="0 0 26 10", aria_hidden="true")


def _y_labels(chart: Chart) -> list[Html]:
    return [
        el("span", chart.y.write(value), style=f"bottom:{100 * chart.y.share(value):.2f}%")
        for value in chart.y.ticks
    ]


def _x_labels(chart: Chart) -> list[Html]:
    """Return the labels; every second one gives way on a narrow page, one at the end stays in."""
    labels = []
    for index, value in enumerate(chart.x.ticks):
        share = chart.x.share(value)
        classes = ["odd"] * (index % 2) + ["last"] * (share > _NEAR_END)
        style = f"left:{100 * share:.2f}%"
        text = chart.x.write(value)
        labels.append(el("span", text, style=style, class_=" ".join(classes) or None))
    return labels


def _svg(chart: Chart) -> Html:
    parts = [
        *(_band(chart, band, index) for index, band in enumerate(chart.bands)),
        *(el("path", d=f"M0 {_y(chart, value)}H1000", class_="tick") for value in chart.y.ticks),
        *(el("path", d=f"M{_x(chart, value)} 0V1000", class_="tick") for value in chart.x.ticks),
        *(_filling(chart, line) for line in chart.lines if line.is_filled),
    ]
    if chart.dots:
        moves = (f"M{_x(chart, x)} {_y(chart, y)}h0" for x, y in chart.dots if y is not None)
        parts.append(el("path", d="".join(moves), class_="dots"))
    parts += (
        el("path", d=_course(chart, line), class_=f"line s{line.style}", data_style=line.style)
        for line in chart.lines
    )
    parts += (el("path", d=_rule(chart, rule), class_="rule") for rule in chart.rules)
    names = ", ".join(line.name for line in chart.lines)
    return el(
        "svg",
        parts,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{chart.title}: {names}",
    )


def _x(chart: Chart, value: float) -> str:
    return f"{_SIZE * chart.x.share(value):.1f}".removesuffix(".0")


def _y(chart: Chart, value: float) -> str:
    return f"{_SIZE * (1.0 - chart.y.share(value)):.1f}".removesuffix(".0")


def _course(chart: Chart, line: Line) -> str:
    """Return the path's text; it is broken where there is no value."""
    parts: list[str] = []
    is_down = False
    for x, y in line.points:
        if y is None:
            is_down = False
            continue
        if is_down and line.is_stepped:
            parts.append(f"H{_x(chart, x)}V{_y(chart, y)}")
        else:
            parts.append(f"{'L' if is_down else 'M'}{_x(chart, x)} {_y(chart, y)}")
            # A single value between gaps would not be seen.
            parts.append("" if is_down else "h0")
        is_down = True
    return "".join(parts)


def _filling(chart: Chart, line: Line) -> Html:
    course = _course(chart, line)
    first, last = line.points[0][0], line.points[-1][0]
    closed = f"{course}L{_x(chart, last)} 1000L{_x(chart, first)} 1000Z"
    return el("path", d=closed, class_=f"fill s{line.style}")


def _rule(chart: Chart, rule: Rule) -> str:
    if rule.is_vertical:
        return f"M{_x(chart, rule.value)} 0V1000"
    return f"M0 {_y(chart, rule.value)}H1000"


def _band(chart: Chart, band: Band, index: int) -> Html:
    left, right = (_SIZE * chart.x.share(value) for value in (band.begin, band.end))
    return el(
        "rect",
        x=f"{left:.1f}",
        y=0,
        width=f"{max(0.0, right - left):.1f}",
        height=1000,
        class_="band odd" if index % 2 else "band",
    )


def _rule_texts(chart: Chart) -> list[Html]:
    """Return what stands in the plot: rules' texts, and the bands' names along the top.

    A rule's text stands on its other side where the plot ends soon.
    """
    texts = []
    for rule in chart.rules:
        if rule.is_vertical:
            place = f"left:{100 * chart.x.share(rule.value):.2f}%"
        else:
            place = f"bottom:{100 * chart.y.share(rule.value):.2f}%"
        kind = "rule-text across" if rule.is_vertical else "rule-text"
        if rule.is_vertical and chart.x.share(rule.value) > 0.7:
            kind += " before"
        texts.append(el("span", rule.text, class_=kind, style=place))
    for band in chart.bands if chart.are_bands_named else ():
        left, right = (100 * chart.x.share(value) for value in (band.begin, band.end))
        place = f"left:{left:.2f}%;width:{right - left:.2f}%"
        texts.append(el("span", band.name, class_="band-text", style=place, title=band.name))
    return texts


def _cursor() -> Html:
    return el("div", class_="cursor", hidden="")
