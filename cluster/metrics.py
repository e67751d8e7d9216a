"""Every metric this project exports, declared once: name, type, unit, labels, help.

Names are as they are scraped. A declaration belongs to the components whose processes export it
(`cluster/exporter.py`); which process a sample is from is said by its target's labels, so no
metric has one of those (`TARGET_LABELS`). `python -m deploy.metric_table` writes docs/metrics.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cluster.names import Component
from cluster.stages import BUCKETS_S, TimeCounts

# A second series per counter and histogram that nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]


TARGET_LABELS = frozenset({"deployment", "component", "worker_id", "role", "node"})
REGISTRIES = {component: CollectorRegistry() for component in Component}

_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1, 1.5, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1, 5)
_ACTION_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric as operators see it; `unit` is what one of its value is."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str
    component: Component


DECLARED: list[Declaration] = []


class CountedElsewhere(Collector):
    """A counter whose total another process keeps: it is set, not added to."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label = name, text, label
        self._totals: Mapping[str, float] = {}
        registry.register(self)

    def set(self, totals: Mapping[str, float]) -> None:
        """Take over the totals by label value."""
        self._totals = dict(totals)

    def describe(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, labels=[self._label])

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for value, total in self._totals.items():
            family.add_metric([value], total)
        yield family


class TimedElsewhere(Collector):
    """A histogram over `stages.BUCKETS_S` whose counts another process keeps."""

    def __init__(self, name: str, text: str, label: str, registry: CollectorRegistry) -> None:
        self._name, self._text, self._label = name, text, label
        self._counts: Mapping[str, TimeCounts] = {}
        registry.register(self)

    def set(self, counts: Mapping[str, TimeCounts]) -> None:
        """Take over the counts by label value."""
        self._counts = dict(counts)

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._text, labels=[self._label])

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        bounds = [*map(str, map(float, BUCKETS_S)), "+Inf"]
        for value, counts in self._counts.items():
            running, cumulative = 0, []
            for bound, count in zip(bounds, counts.buckets, strict=True):
                running += count
                cumulative.append((bound, float(running)))
            family.add_metric([value], cumulative, counts.sum_s)
        yield family


class _Declarer:
    """Declares the metrics of one component; each call adds a `Declaration`."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self._registry = REGISTRIES[component]

    def counter(self, name: str, unit: str, text: str, *labels: str) -> Counter:
        self._note(name, "counter", unit, text, labels)
        return Counter(name, text, labels, registry=self._registry)

    def gauge(self, name: str, unit: str, text: str, *labels: str) -> Gauge:
        self._note(name, "gauge", unit, text, labels)
        return Gauge(name, text, labels, registry=self._registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self._note(name, "histogram", "seconds", text, labels)
        return Histogram(name, text, labels, registry=self._registry, buckets=buckets)

    def counted_elsewhere(self, name: str, unit: str, text: str, label: str) -> CountedElsewhere:
        self._note(name, "counter", unit, text, (label,))
        return CountedElsewhere(name, text, label, self._registry)

    def timed_elsewhere(self, name: str, text: str, label: str) -> TimedElsewhere:
        self._note(name, "histogram", "seconds", text, (label,))
        return TimedElsewhere(name, text, label, self._registry)

    def _note(self, name: str, kind: str, unit: str, text: str, labels: tuple[str, ...]) -> None:
        DECLARED.append(Declaration(name, kind, unit, labels, text, self._component))


_every, _router = _Declarer(Component.EVERY), _Declarer(Component.ROUTER)
_worker, _controller = _Declarer(Component.WORKER), _Declarer(Component.CONTROLLER)

# --- every process

MALFORMED_FRAMES = _every.counter(
    "tandem_malformed_frames_total",
    "frames",
    "Frames of the request plane dropped because they are no valid messages: `request` at"
    " workers, `token` at routers and the controller, `engine` between a worker and its engine",
    "plane",
)
BROKEN_LINKS = _every.counter(
    "tandem_broken_links_total",
    "links",
    "Times that messages to or from a worker were lost on the way, with requests open there",
)

# --- routers: what clients see

ARRIVED = _router.counter("tandem_arrived_total", "requests", "Requests that came in")
REQUESTS = _router.counter(
    "tandem_requests_total",
    "requests",
    "Requests that ended, by outcome: stop, length and repetition are the good ones",
    "outcome",
)
INPUT_TOKENS = _router.counter(
    "tandem_input_tokens_total", "tokens", "Prompt tokens of the requests that came in"
)
OUTPUT_TOKENS = _router.counter(
    "tandem_output_tokens_total", "tokens", "Tokens generated for clients"
)
PROMPT_TOKENS = _router.counter(
    "tandem_prompt_tokens_total",
    "tokens",
    "Prompt tokens on decode by origin, as its engine counts them: transferred, reused (cached"
    " there), recomputed (should have been transferred), local (decode's own to compute)",
    "origin",
)
TTFT_SECONDS = _router.histogram("tandem_ttft_seconds", "Arrival to first token", _TTFT_S)
ITL_SECONDS = _router.histogram(
    "tandem_itl_seconds", "Time between two answers with tokens of one request", _TOKEN_S
)
TPOT_SECONDS = _router.histogram(
    "tandem_tpot_seconds",
    "First token to last, per token after the first, of a request that finished",
    _TOKEN_S,
)
E2E_SECONDS = _router.histogram(
    "tandem_e2e_seconds", "Arrival to the end of a request that finished", _REQUEST_S
)
QUEUE_SECONDS = _router.histogram(
    "tandem_queue_seconds", "Arrival to the first placement on workers", _REQUEST_S
)
PREFILL_SECONDS = _router.histogram(
    "tandem_prefill_seconds",
    "Placement to the prompt computed, prefill's own queue included",
    _REQUEST_S,
)
TRANSFER_SECONDS = _router.histogram(
    "tandem_transfer_seconds",
    "Prompt computed to decode's first token: the whole hand-off and decode's first step",
    _REQUEST_S,
)
HANDOFF_BYTES = _router.counter(
    "tandem_handoff_bytes_total", "bytes", "KV cache that reached decode for answered requests"
)
HANDOFF_MISMATCHES = _router.counter(
    "tandem_handoff_mismatches_total",
    "handoffs",
    "Hand-offs whose bytes sent and bytes received differ",
)
RECOVERIES = _router.counter(
    "tandem_recoveries_total",
    "placements",
    "Placements repeated after one came to nothing, by cause",
    "cause",
)
REJECTIONS = _router.counter(
    "tandem_rejections_total",
    "requests",
    "Requests that no placement was found for, by why",
    "cause",
)
KEYS_REFUSED = _router.counter(
    "tandem_keys_refused_total",
    "requests",
    "Requests that an API key did not let in: missing, unknown, role (an admin's path), rate (429)",
    "cause",
)
WAITING_REQUESTS = _router.gauge(
    "tandem_waiting_requests", "requests", "Requests in line for a placement at this router"
)
OPEN_RESERVATIONS = _router.gauge(
    "tandem_open_reservations", "requests", "Requests with room reserved on workers"
)
READY_LINKS = _router.gauge(
    "tandem_ready_links",
    "workers",
    "Workers that answer this router, by the pool they serve",
    "pool",
)
SLO_REQUESTS = _router.counter(
    "tandem_slo_requests_total",
    "requests",
    "Requests held against the objectives: all but those their client cancelled or got wrong",
)
SLO_MET = _router.counter(
    "tandem_slo_met_total",
    "requests",
    "Of those, the ones that finished within an objective: ttft, tbt (mean time between tokens)"
    " or both; one that is not configured is always met",
    "objective",
)

# --- workers: engine and KV plane

TOTAL_BLOCKS = _worker.gauge(
    "tandem_blocks", "blocks", "KV blocks of the engine's pool that requests can use"
)
FREE_BLOCKS = _worker.gauge(
    "tandem_free_blocks", "blocks", "KV blocks free or evictable in the engine's pool"
)
PINNED_BLOCKS = _worker.gauge(
    "tandem_pinned_blocks", "blocks", "KV blocks held for hand-offs that decode has not pulled yet"
)
PINNED_BLOCK_SECONDS = _worker.counter(
    "tandem_pinned_block_seconds_total",
    "block-seconds",
    "Held KV blocks times how long; `GET /debug/pinned` names the holders that cost the most",
)
LEAKED_BLOCKS = _worker.gauge(
    "tandem_leaked_blocks",
    "blocks",
    "KV blocks that stayed taken with no request open and nothing held; as of the last idle time",
)
HELD_HANDOFFS = _worker.gauge("tandem_held_handoffs", "handoffs", "Hand-offs that pin blocks")
OPEN_REQUESTS = _worker.gauge(
    "tandem_open_requests", "requests", "Requests of routers that are open at this worker"
)
ENGINE_REQUESTS = _worker.gauge(
    "tandem_engine_requests", "requests", "Requests in the engine: running or waiting", "state"
)
ENGINE_TOKENS = _worker.counter(
    "tandem_engine_tokens_total",
    "tokens",
    "Tokens the engine computed: generated (as a decode worker) or prompt (as a prefill worker)",
    "kind",
)
BUSY_SECONDS = _worker.counter(
    "tandem_busy_seconds_total", "seconds", "Time with at least one request open"
)
CANCELLATIONS = _worker.counted_elsewhere(
    "tandem_cancellations_total",
    "requests",
    "Requests cut short at the engine, by where they were: prefill, held (its KV cache waited"
    " to be pulled) or decode",
    "stage",
)
SUBMISSIONS_REFUSED = _worker.counter(
    "tandem_submissions_refused_total",
    "requests",
    "Requests of routers not taken: duplicate, leaving (another role is next), role (the other"
    " one's), invalid",
    "cause",
)
HANDOFFS = _worker.counted_elsewhere(
    "tandem_handoffs_total",
    "handoffs",
    "Held KV caches freed, by why: released (pulled), expired (its lease ran out), aborted"
    " (cancelled), duplicate",
    "end",
)
PULLS = _worker.counted_elsewhere(
    "tandem_pulls_total", "pulls", "Pulls of KV caches that ended: loaded or failed", "end"
)
READS_REFUSED = _worker.counted_elsewhere(
    "tandem_reads_refused_total",
    "reads",
    "Reads of held KV caches that were refused, by cause",
    "cause",
)
KV_FAULTS = _worker.counted_elsewhere(
    "tandem_kv_faults_total",
    "messages",
    "What the KV plane dropped or broke on: chunks late, foreign or damaged, frames malformed,"
    " port errors",
    "kind",
)
PEERS_REFUSED = _worker.counted_elsewhere(
    "tandem_peers_refused_total",
    "connections",
    "Connections to this worker that its sockets did not take: key (not one of the deployment's),"
    " protocol (no CURVE, meant for another server, or ended in the handshake)",
    "cause",
)
KV_BYTES = _worker.counted_elsewhere(
    "tandem_kv_bytes_total",
    "bytes",
    "KV cache payload sent and received by this worker",
    "direction",
)
KV_TRANSPORT_BYTES = _worker.counted_elsewhere(
    "tandem_kv_transport_bytes_total",
    "bytes",
    "KV cache payload received by this worker, by how it came: cma, shm, tcp, gloo, cuda_ipc, nccl",
    "transport",
)
HANDOFF_STAGE_SECONDS = _worker.timed_elsewhere(
    "tandem_handoff_stage_seconds",
    "Steps of hand-offs. Once per pull: wait (for decode to have room), pull (first read to last"
    " block). Once per chunk: gather (copy out, on prefill), verify (checksum) and scatter (copy"
    " in, on decode)",
    "stage",
)

# --- the controller: pools and decisions

REFUSED_PAIRS = _controller.gauge(
    "tandem_refused_pairs",
    "pairs",
    "Pairs of workers that never hand over: their KV caches differ, as `tandem status` says",
)
HEALTHY = _controller.gauge(
    "tandem_healthy", "boolean", "1 if both pools have a Ready worker, else 0"
)
WORKERS = _controller.gauge(
    "tandem_workers",
    "workers",
    "Workers by the pool they belong to and their state",
    "pool",
    "state",
)
WANTED_WORKERS = _controller.gauge(
    "tandem_wanted_workers", "workers", "Size each pool is brought to", "pool"
)
READY_RATIO = _controller.gauge(
    "tandem_ready_ratio", "ratio", "Ready prefill workers per Ready decode worker"
)
TARGET_RATIO = _controller.gauge(
    "tandem_target_ratio", "ratio", "Prefill workers per decode worker that the policy keeps"
)
SIGNAL = _controller.gauge(
    "tandem_signal",
    "various",
    "What the autoscaler measures: decode_tps and prefill_tps in tokens/s, decode_util and"
    " prefill_util as shares of 1, ttft and tbt in seconds at the watched quantile, arrivals in"
    " requests/s; absent while unknown",
    "signal",
)
SIGNAL_TARGET = _controller.gauge(
    "tandem_signal_target",
    "various",
    "What the Ready workers should carry of the signal that sizes the pools, in its unit: target"
    " per worker times workers for tokens/s, the target share, or the objective in seconds",
    "signal",
)
OBJECTIVE_SECONDS = _controller.gauge(
    "tandem_objective_seconds", "seconds", "Configured objectives: ttft, tbt", "objective"
)
OBJECTIVE_RATIO = _controller.gauge(
    "tandem_objective_ratio", "ratio", "Share of requests that should meet an objective"
)
POOL_LIMIT_WORKERS = _controller.gauge(
    "tandem_pool_limit_workers",
    "workers",
    "Configured bounds of the pools: min, max",
    "pool",
    "bound",
)
RAW_TARGET_WORKERS = _controller.gauge(
    "tandem_raw_target_workers",
    "workers",
    "Pool sizes the last decision's driver asked for; absent if it asked nothing",
    "pool",
)
FINAL_TARGET_WORKERS = _controller.gauge(
    "tandem_final_target_workers",
    "workers",
    "Pool sizes the last decision came to after every limit",
    "pool",
)
DECISIONS = _controller.counter(
    "tandem_decisions_total",
    "decisions",
    "Decisions of the autoscaler by action and by what they rest on",
    "action",
    "driver",
)
ACTIONS = _controller.counter(
    "tandem_actions_total",
    "actions",
    "Changes of workers begun, by kind: start, activate (a standby), flip (to the other role),"
    " restore (one being taken out), drain, stop",
    "action",
)
ACTION_SECONDS = _controller.histogram(
    "tandem_action_seconds",
    "How long they took: start, activate, flip until Ready; drain from taken out to stopped; stop"
    " until gone",
    _ACTION_S,
    "action",
)
WORKER_FAILURES = _controller.counter(
    "tandem_worker_failures_total",
    "workers",
    "Workers that died, fell silent, did not start or could not hand over",
    "pool",
)
UNPLACED = _controller.gauge(
    "tandem_unplaced", "needs", "Reasons for which workers wait for room, as `tandem status` shows"
)
ROUTERS = _controller.gauge("tandem_routers", "routers", "Routers that follow the controller")
EPOCH = _controller.gauge("tandem_controller_epoch", "lives", "Controllers this deployment has had")
