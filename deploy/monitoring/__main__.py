"""Writes the dashboards' JSON: `python -m deploy.monitoring`."""

from pathlib import Path

from deploy.monitoring.dashboards import DASHBOARDS, rendered

FOLDER = Path(__file__).parent / "grafana" / "dashboards"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        path = FOLDER / f"{dashboard.uid}.json"
        path.write_text(rendered(dashboard))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
