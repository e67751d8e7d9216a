"""This process's metrics over HTTP, for Prometheus to scrape: one server on a port of its own."""

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from cluster.metrics import REGISTRIES
from cluster.names import Component


def exported(component: Component) -> CollectorRegistry:
    """Return what a process of this kind shows: its component's metrics, what every process
    counts, and what the interpreter and libraries say of themselves."""
    registry = CollectorRegistry()
    for each in (REGISTRIES[component], REGISTRIES[Component.EVERY], REGISTRY):
        registry.register(each)
    return registry


class Exporter:
    """Serves until closed; `address` is "host:port", as a scrape target is written."""

    def __init__(self, component: Component, host: str) -> None:
        self._server, self._thread = start_http_server(0, host, exported(component))
        written = f"[{host}]" if ":" in host else host
        self.address = f"{written}:{self._server.server_port}"

    def __repr__(self) -> str:
        return f"<Exporter {self.address}>"

    def close(self) -> None:
        """Stop listening; takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
