"""Traces of requests, sent to an OpenTelemetry collector (OTLP over HTTP) if one is configured.

Spans are made from a request's record when it has ended: a running request pays nothing. They
leave by a thread of the SDK through a bounded queue; what a slow or dead collector does not take
is dropped.
"""

import logging
import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.config import TandemConfig
from router.exchange import TRACE_HEADER
from router.records import RequestRecord
from router.spans import Span, spans_of

# How long a span may wait, and how long the collector may take.
_DELAY_MS, _TIMEOUT_S = 1000, 5.0
# A router that stops waits no longer than this for the collector.
_CLOSE_S = 2.0
_NS = 1_000_000_000

logger = logging.getLogger(__name__)


class Traces:
    """Turns records into traces under the client's own one, if it sent a `traceparent`."""

    def __init__(self, exporter: SpanExporter, config: TandemConfig, router_id: str) -> None:
        resource = Resource.create(
            {
                "service.name": "tandem",
                "service.instance.id": router_id,
                "tandem.deployment": config.cluster.name,
            }
        )
        sampler = ParentBased(TraceIdRatioBased(config.tracing.share))
        self._exporter = exporter
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS)
        )
        self._tracer: Tracer = self._provider.get_tracer("tandem.router")
        self._model = config.model.name
        self._propagator = TraceContextTextMapPropagator()

    def record(self, record: RequestRecord) -> None:
        """Queue the spans of a request that has just ended. Never raises."""
        try:
            self._record(record, time.time_ns())
        except Exception:
            logger.exception("no trace of %r", record)

    def _record(self, record: RequestRecord, now_ns: int) -> None:
        carrier = {} if record.traceparent is None else {TRACE_HEADER: record.traceparent}
        root, stages = spans_of(record)
        arrived_ns = now_ns - int(root.end_s * _NS)
        attributes = {**root.attributes, "gen_ai.request.model": self._model}
        root = Span(root.name, root.start_s, root.end_s, attributes, root.error)
        within = self._propagator.extract(carrier, Context())
        inside = self._emit(root, within, SpanKind.SERVER, arrived_ns)
        for stage in stages:
            self._emit(stage, inside, SpanKind.INTERNAL, arrived_ns)

    def _emit(self, span: Span, within: Context, kind: SpanKind, arrived_ns: int) -> Context:
        """Make the span, over already; return the context of those inside it."""
        made = self._tracer.start_span(
            span.name,
            within,
            kind,
            dict(span.attributes),
            start_time=arrived_ns + int(span.start_s * _NS),
        )
        if span.error is not None:
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(arrived_ns + int(span.end_s * _NS))
        return set_span_in_context(made, within)

    def close(self) -> None:
        """Send what is queued; give up on a collector that does not answer for `_CLOSE_S`."""
        # The SDK tries every batch of the queue for its whole time-out, unless this is over.
        limit = threading.Timer(_CLOSE_S, self._exporter.shutdown)
        limit.start()
        self._provider.shutdown()
        limit.cancel()


def open_traces(endpoint: str, config: TandemConfig, router_id: str) -> Traces:
    """Return what sends records to the collector at `endpoint`."""
    return Traces(OTLPSpanExporter(endpoint, timeout=_TIMEOUT_S), config, router_id)
