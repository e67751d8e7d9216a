"""The dashboards that ship, and their files' text."""

import json

from deploy.monitoring.kv_plane import KV_PLANE
from deploy.monitoring.overview import OVERVIEW
from deploy.monitoring.panels import Dashboard, document
from deploy.monitoring.scaling import AUTOSCALER

DASHBOARDS = (OVERVIEW, AUTOSCALER, KV_PLANE)


def rendered(dashboard: Dashboard) -> str:
    """Return the text of the dashboard's file."""
    return json.dumps(document(dashboard), indent=1, ensure_ascii=False) + "\n"
