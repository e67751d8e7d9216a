"""Dashboards described in a few words, and the JSON that Grafana reads (its classic model).

Panels flow from left to right in rows of 24 columns. Two variables are in every dashboard:
`$datasource`, and `$deployment`, which every query must select by.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 41  # of Grafana 11.6; later ones migrate it when they load it
_COLUMNS = 24
_TAG = "tandem"
_EVERYWHERE = "tandem_arrived_total"  # every deployment has it as soon as it answers
_SOURCE = {"type": "prometheus", "uid": "$datasource"}

Kind = Literal["timeseries", "stat", "state-timeline", "table"]
# Name of the colour, and the value from which it holds.
Step = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression; `legend` may name labels as `{{role}}`."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit` is Grafana's name of it: s, bytes, Bps, percentunit, short, reqps.

    `steps` colour a stat or a state from the value on; `line` draws them into a time series.
    `words` replaces values by text.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    is_stacked: bool = False
    low: float | None = 0
    high: float | None = None
    decimals: int | None = None
    steps: Sequence[Step] = ()
    words: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels, which may wrap."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard; `uid` is in its address and in its file's name."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    marks: Sequence[Query] = ()
    """Queries whose samples are drawn as vertical lines through every panel."""

    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels


def document(dashboard: Dashboard) -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [_TAG],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": [_annotation(mark) for mark in dashboard.marks]},
        "links": [_links_to_the_others()],
        "panels": list(_laid_out(dashboard.rows)),
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {
            "type": "datasource",
            "name": "datasource",
            "label": "Data source",
            "query": "prometheus",
            "refresh": 1,
        },
        {
            "type": "query",
            "name": "deployment",
            "label": "Deployment",
            "datasource": _SOURCE,
            "query": {"query": f"label_values({_EVERYWHERE}, deployment)", "refId": "deployment"},
            # Whenever the time range changes: deployments come and go.
            "refresh": 2,
            "sort": 1,
        },
    ]


def _annotation(mark: Query) -> dict[str, Any]:
    return {
        "name": mark.legend,
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "purple",
        "expr": mark.expr,
    }


def _links_to_the_others() -> dict[str, Any]:
    return {
        "title": "Tandem",
        "type": "dashboards",
        "tags": [_TAG],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "",
        "tooltip": "",
        "url": "",
    }


def _laid_out(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield rows and panels with their places, numbered from 1."""
    number, top = 1, 0
    for row in rows:
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": top}
        base = {"id": number, "type": "row", "title": row.title, "gridPos": place}
        yield {**base, "collapsed": False, "panels": []}
        number, top, left, tallest = number + 1, top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            place = {"h": panel.height, "w": panel.width, "x": left, "y": top}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number, left, tallest = number + 1, left + panel.width, max(tallest, panel.height)
        top += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "targets": [_target(panel, index) for index in range(len(panel.queries))],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(panel: Panel, index: int) -> dict[str, Any]:
    query = panel.queries[index]
    is_table = panel.kind == "table"
    return {
        "refId": chr(ord("A") + index),
        "datasource": _SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "instant": is_table,
        "range": not is_table,
        "format": "table" if is_table else "time_series",
    }


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic-by-name"}}
    if panel.low is not None:
        field["min"] = panel.low
    if panel.high is not None:
        field["max"] = panel.high
    if panel.decimals is not None:
        field["decimals"] = panel.decimals
    if panel.steps:
        steps = [{"color": color, "value": value} for color, value in panel.steps]
        field["thresholds"] = {
            "mode": "absolute",
            "steps": [{"color": "text", "value": None}, *steps],
        }
        if panel.kind != "timeseries":
            field["color"] = {"mode": "thresholds"}
    if panel.words is not None:
        options = {value: {"text": text} for value, text in panel.words.items()}
        field["mappings"] = [{"type": "value", "options": options}]
    if panel.kind == "timeseries":
        field["custom"] = _lines(panel)
    return field


def _lines(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        # Counts of workers and decisions hold until they change.
        "lineInterpolation": "stepAfter" if panel.decimals == 0 else "linear",
        "lineWidth": 1,
        "fillOpacity": 25 if panel.is_stacked else 5,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if panel.steps else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    match panel.kind:
        case "timeseries":
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "state-timeline":
            return {
                "legend": legend,
                "tooltip": {"mode": "single", "sort": "none"},
                "showValue": "auto",
                "rowHeight": 0.9,
                "mergeValues": True,
            }
        case "table":
            return {"frameIndex": 0, "showHeader": True}
        case "stat":
            return {
                "colorMode": "value",
                "graphMode": "area",
                "justifyMode": "auto",
                "textMode": "auto",
                "wideLayout": True,
                "showPercentChange": False,
                "percentChangeColorMode": "standard",
                "orientation": "auto",
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            }
