"""What Prometheus and Grafana need to watch a deployment: scrape configuration, rules, dashboards.

`python -m deploy.monitoring` writes the dashboards' JSON from `dashboards.py`; the rest is YAML.
"""
