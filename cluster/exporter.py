"""This process's metrics over HTTP, for Prometheus to scrape: one server on a port of its own."""

import socket
import threading
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from cluster.metrics import REGISTRIES
from cluster.names import Component

# Anybody may connect, so what a connection can take of the process is bounded.
_MAX_CONNECTIONS = 16
_QUIET_S = 5.0


def exported(component: Component) -> CollectorRegistry:
    """Return what a process of this kind shows: its component's metrics, what every process
    counts, and what the interpreter and libraries say of themselves."""
    registry = CollectorRegistry()
    for each in (REGISTRIES[component], REGISTRIES[Component.EVERY], REGISTRY):
        registry.register(each)
    return registry


class _Connection(WSGIRequestHandler):
    timeout = _QUIET_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class _Server(ThreadingWSGIServer):
    """A thread per connection, up to `_MAX_CONNECTIONS`; more are closed at once."""

    def __init__(self, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._room = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__((host, 0), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that broke off is nobody's error here."""


class Exporter:
    """Serves until closed; `address` is "host:port", as a scrape target is written."""

    def __init__(self, component: Component, host: str) -> None:
        self._server = _Server(host)
        self._server.set_app(make_wsgi_app(exported(component)))
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="exporter", daemon=True
        )
        self._thread.start()
        written = f"[{host}]" if ":" in host else host
        self.address = f"{written}:{self._server.server_port}"

    def __repr__(self) -> str:
        return f"<Exporter {self.address}>"

    def close(self) -> None:
        """Stop listening; takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
