"""The dashboards are what Grafana's own model says a dashboard is."""

import copy

from tests import monitoring
from tests.integration.monitoring import grafana_model


def test_dashboards_fit_grafanas_model() -> None:
    for name, document in monitoring.dashboards().items():
        assert grafana_model.faults(document) == [], name


def test_a_dashboard_that_does_not_fit_is_found() -> None:
    document = copy.deepcopy(next(iter(monitoring.dashboards().values())))
    panel = next(monitoring.panels(document))
    panel["gridPos"]["w"] = "4"
    panel["targets"][0]["exprr"] = "up"
    panel["fieldConfig"]["defaults"]["color"]["mode"] = "rainbow"
    places = [fault.partition(": ")[0] for fault in grafana_model.faults(document)]
    assert places == [
        ".panels[1].targets[0].exprr",
        ".panels[1].grid_pos.w",
        ".panels[1].field_config.defaults.color.mode",
    ]
