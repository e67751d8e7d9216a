"""Every query that deploy/monitoring asks of Prometheus, and the names that stand in it."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).resolve().parent.parent / "deploy" / "monitoring"
DASHBOARDS = MONITORING / "grafana" / "dashboards"
PROMETHEUS = MONITORING / "prometheus"
RULES = PROMETHEUS / "rules"

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_WINDOW = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
# Words of PromQL that the queries use; any other word must be a metric.
_FUNCTIONS = {"abs", "changes", "clamp_min", "histogram_quantile", "increase", "rate"}
_WORDS = _FUNCTIONS | {"and", "count", "max", "min", "sum", "unless"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One query, and where it stands."""

    where: str
    expr: str

    def selectors(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield every metric of the query with the labels that select its series."""
        bare = _WINDOW.sub("", _GROUPING.sub("", _STRING.sub("", self.expr)))
        for name, matchers in _SELECTOR.findall(bare):
            if name not in _WORDS:
                yield name, frozenset(_MATCHER.findall(matchers))

    def grouped_by(self) -> frozenset[str]:
        """Return every label that the query groups or joins by."""
        lists = _GROUPING.findall(_STRING.sub("", self.expr))
        return frozenset(label.strip() for text in lists for label in text.split(",")) - {""}


@functools.cache
def dashboards() -> dict[str, dict[str, Any]]:
    """Return the committed dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


def panels(dashboard: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the dashboard's panels without its rows."""
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def of_dashboards() -> Iterator[Asked]:
    """Yield the queries of panels and marks, with Grafana's variables in them."""
    for file, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield Asked(f"{file}: {panel['title']}: {target['refId']}", target["expr"])
        for mark in dashboard["annotations"]["list"]:
            yield Asked(f"{file}: {mark['name']}", mark["expr"])


@functools.cache
def rules() -> list[tuple[str, Mapping[str, Any]]]:
    """Return file name and rule, recording rules and alerts."""
    return [
        (path.name, rule)
        for path in sorted(RULES.glob("*.yaml"))
        for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]
        for rule in group["rules"]
    ]


def of_rules() -> Iterator[Asked]:
    for file, rule in rules():
        yield Asked(f"{file}: {rule.get('alert') or rule.get('record')}", rule["expr"])
