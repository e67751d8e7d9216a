"""Traces of requests at a collector that takes them, and at one that does not."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cluster.config import parse_config
from deploy.ports import free_port
from router.records import Records
from router.traces import Traces, open_traces
from tests.integration.router.pools import Pools

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, and answers what a collector answers."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        server: Any = self.server
        server.taken.append((self.path, self.headers["content-type"], body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Yield a running collector's address and what it has been sent."""
    taken: list[tuple[str, str, bytes]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.taken = taken  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", taken
        server.shutdown()
        thread.join()


def open_to(endpoint: str) -> Traces:
    return open_traces(endpoint, parse_config({"tracing": {"endpoint": endpoint}}), "router-1")


async def ended(traces: Traces, traceparent: str | None) -> Records:
    """Serve one request and pass its record on as a router does."""
    async with Pools() as pools:
        record = await pools.answered()
        record.traceparent = traceparent
        traces.record(record)
        return pools.records


def spans_in(body: bytes) -> dict[str, Span]:
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert names["service.name"] == "tandem" and names["service.instance.id"] == "router-1"
    return {span.name: span for scope in resource.scope_spans for span in scope.spans}


def attributes(span: Span) -> dict[str, object]:
    values = {each.key: each.value for each in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


async def test_a_request_is_a_trace_under_the_client_s_own() -> None:
    with collector() as (endpoint, taken):
        traces = open_to(endpoint)
        before_ns = time.time_ns()
        await ended(traces, f"00-{TRACE}-{PARENT}-01")
        traces.close()
    ((path, content_type, body),) = taken
    assert (path, content_type) == ("/v1/traces", "application/x-protobuf")
    spans = spans_in(body)
    root = spans.pop("router")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert list(spans) == ["queue", "prefill", "transfer", "decode"]
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    assert {span.trace_id for span in spans.values()} == {root.trace_id}
    assert before_ns <= root.start_time_unix_nano <= root.end_time_unix_nano <= time.time_ns()
    ends = [(s.start_time_unix_nano, s.end_time_unix_nano) for s in spans.values()]
    assert ends == sorted(ends) and ends[0][0] == root.start_time_unix_nano
    says = attributes(root)
    assert (says["tandem.prefill_worker"], says["tandem.decode_worker"]) == ("p0", "d0")
    assert (says["tandem.outcome"], says["gen_ai.usage.output_tokens"]) == ("length", 2)
    assert attributes(spans["transfer"])["tandem.transferred_tokens"] == 99
    assert attributes(spans["decode"])["tandem.worker"] == "d0"


async def test_a_client_that_does_not_sample_is_not_traced() -> None:
    with collector() as (endpoint, taken):
        traces = open_to(endpoint)
        await ended(traces, f"00-{TRACE}-{PARENT}-00")
        traces.close()
    assert taken == []


async def test_a_malformed_context_starts_a_trace_of_its_own() -> None:
    with collector() as (endpoint, taken):
        traces = open_to(endpoint)
        await ended(traces, "00-zzz-\x00-01")
        traces.close()
    root = spans_in(taken[0][2])["router"]
    assert root.parent_span_id == b"" and root.trace_id.hex() != TRACE


async def test_a_collector_that_is_gone_costs_spans_and_nothing_else() -> None:
    traces = open_to(f"http://127.0.0.1:{free_port()}/v1/traces")
    records = await ended(traces, None)
    (record,) = records.latest(1)
    began_s = time.monotonic()
    for _ in range(1000):
        traces.record(record)
    traces.record(None)  # type: ignore[arg-type]
    assert time.monotonic() - began_s < 5, "a full queue drops"
    began_s = time.monotonic()
    traces.close()
    assert time.monotonic() - began_s < 5, "nobody waits for the collector"
