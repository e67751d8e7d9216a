"""What deploy/monitoring ships, held against promtool, Grafana's model and a real Prometheus."""
