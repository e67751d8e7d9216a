"""A process's metrics over HTTP, and how little a stranger's connections can take of it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from cluster import exporter
from cluster.exporter import Exporter
from cluster.names import Component

HOST = "127.0.0.1"


@pytest.fixture
def exposed() -> Iterator[Exporter]:
    exposed = Exporter(Component.WORKER, HOST)
    yield exposed
    exposed.close()


def connect(exposed: Exporter) -> socket.socket:
    return socket.create_connection((HOST, int(exposed.address.rpartition(":")[2])), timeout=10)


def test_a_scrape(exposed: Exporter) -> None:
    answer = httpx.get(f"http://{exposed.address}/metrics")
    assert answer.status_code == 200 and "tandem_malformed_frames_total" in answer.text


def test_idle_connections_take_few_threads_and_give_them_back(
    exposed: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter._Connection, "timeout", 0.5)
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(exposed)) for _ in range(100)]
        # What there is no room for is closed, not kept waiting.
        assert all(each.recv(1) == b"" for each in idle[exporter._MAX_CONNECTIONS :])
        assert threading.active_count() - before <= exporter._MAX_CONNECTIONS
        # What was let in is closed once it has said nothing for too long.
        assert all(each.recv(1) == b"" for each in idle[: exporter._MAX_CONNECTIONS])
    assert httpx.get(f"http://{exposed.address}/metrics").status_code == 200
