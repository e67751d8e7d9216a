"""Dashboards and rules ask only for what is exported, show all of it, and are explained."""

import itertools
import re

import pytest
import yaml

from cluster.metrics import DECLARED, TARGET_LABELS
from deploy.monitoring.dashboards import DASHBOARDS, rendered
from tests import monitoring
from tests.monitoring import Asked

RUNBOOK = monitoring.MONITORING.parents[1] / "docs" / "monitoring.md"

# What Prometheus itself adds.
SCRAPED_LABELS = TARGET_LABELS | {"instance", "job", "le"}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
# Labels by the name of a series.
EXPORTED = {
    d.name + suffix: SCRAPED_LABELS | set(d.labels) for d in DECLARED for suffix in SUFFIXES[d.kind]
}
RECORDED = {rule["record"]: rule for _, rule in monitoring.rules() if "record" in rule}
KNOWN = {
    "up": SCRAPED_LABELS,
    **EXPORTED,
    **{name: {"deployment", "objective"} for name in RECORDED},
}
ALERTS = [rule for _, rule in monitoring.rules() if "alert" in rule]


def unknown(asked: Asked) -> list[str]:
    """Return what the query asks for that nobody exports."""
    found = list(asked.selectors())
    wrong = [f"{asked.where}: {name}" for name, _ in found if name not in KNOWN]
    for name, labels in found:
        wrong += [f"{asked.where}: {name}{{{x}}}" for x in labels - KNOWN.get(name, labels)]
    labels_there = {label for name, _ in found for label in KNOWN.get(name, ())}
    return wrong + [f"{asked.where}: by {x}" for x in asked.grouped_by() - labels_there]


def test_queries_ask_for_declared_metrics_and_labels_only() -> None:
    asked = [*monitoring.of_dashboards(), *monitoring.of_rules()]
    assert len(asked) > 100
    assert [fault for each in asked for fault in unknown(each)] == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("rate(tandem_request_total[5m])", "tandem_request_total"),
        ('rate(tandem_requests_total{end="x"}[5m])', "tandem_requests_total{end}"),
        ("sum by (outcom) (rate(tandem_requests_total[5m]))", "by outcom"),
        ("tandem_ttft_seconds", "tandem_ttft_seconds"),
        ("averag(tandem_healthy)", "averag"),
    ],
)
def test_a_wrong_query_is_found(expr: str, fault: str) -> None:
    assert unknown(Asked("here", expr)) == [f"here: {fault}"]


def test_every_metric_is_on_a_dashboard() -> None:
    asked = itertools.chain(monitoring.of_dashboards(), monitoring.of_rules())
    seen = {name for each in asked for name, _ in each.selectors()}
    unseen = {d.name for d in DECLARED if not {d.name + s for s in SUFFIXES[d.kind]} & seen}
    assert unseen == set()


def test_panels_select_one_deployment() -> None:
    for asked in monitoring.of_dashboards():
        for name, labels in asked.selectors():
            assert "deployment" in labels, f"{asked.where}: {name}"


def test_the_committed_dashboards_are_the_described_ones() -> None:
    committed = {path.name: path.read_text() for path in monitoring.DASHBOARDS.glob("*.json")}
    described = {f"{dashboard.uid}.json": rendered(dashboard) for dashboard in DASHBOARDS}
    assert committed == described, "run: python -m deploy.monitoring"


def test_grafana_is_told_where_the_dashboards_and_their_data_are() -> None:
    folder = monitoring.MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["access"]) == ("prometheus", "proxy")
    (provider,) = yaml.safe_load((folder / "dashboards" / "tandem.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    assert f"`{provider['options']['path']}`" in RUNBOOK.read_text()


def test_panels_are_explained_and_do_not_overlap() -> None:
    for name, document in monitoring.dashboards().items():
        taken: dict[tuple[int, int], str] = {}
        for panel in document["panels"]:
            place = panel["gridPos"]
            columns = range(place["x"], place["x"] + place["w"])
            assert max(columns) < 24, f"{name}: {panel['title']} is cut off"
            cells = itertools.product(columns, range(place["y"], place["y"] + place["h"]))
            for cell in cells:
                assert taken.setdefault(cell, panel["title"]) == panel["title"], name
        for panel in monitoring.panels(document):
            assert panel["description"].endswith("."), f"{name}: {panel['title']}"
        ids = [panel["id"] for panel in document["panels"]]
        assert len(set(ids)) == len(ids)


def test_alerts_are_explained_and_have_a_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        notes = alert["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}
        assert notes["runbook"] == f"docs/monitoring.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
