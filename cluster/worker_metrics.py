"""What a worker exports of itself, its engine and the engine's KV plane."""

from collections import Counter
from collections.abc import Mapping

from cluster import metrics
from cluster.config import HandoffSection
from cluster.engine import EngineLoad, EngineOutput
from cluster.leaks import LeakWatch
from cluster.names import Role
from cluster.roles import Ending
from cluster.stages import times_in

# Longer than a pull that got stuck takes to give its blocks back.
_SETTLE_S = 2.0
_READS_REFUSED = ("unknown", "ended", "stale_epoch", "layout", "range", "transport", "crowded")
# The engine's totals by the prefix of their keys: the metric each kind is exported as, and what
# is shown as 0 before it has happened, so that the first time is seen as an increase.
_BY_PREFIX = {
    "handoffs_": (metrics.HANDOFFS, ("released", "expired", "aborted", "duplicate")),
    "pulls_": (metrics.PULLS, ("loaded", "failed")),
    "refused_": (metrics.READS_REFUSED, _READS_REFUSED),
    "bytes_": (metrics.KV_BYTES, ("sent", "received")),
    "peers_": (metrics.PEERS_REFUSED, ("key", "protocol")),
    "via_": (metrics.KV_TRANSPORT_BYTES, ("cma", "shm", "tcp", "gloo", "cuda_ipc", "nccl")),
}
_SUBMISSIONS_REFUSED = ("duplicate", "leaving", "role", "invalid")
_FAULTS = (
    "chunks_late",
    "chunks_foreign",
    "chunks_damaged",
    "chunks_overtaken",
    "parcels_overdue",
    "frames_malformed",
    "port_errors",
    "reads_broken",
)


class WorkerMetrics:
    """Counts what the worker does, and shows its engine's load whenever somebody asks for it."""

    def __init__(self, section: HandoffSection) -> None:
        self._leaks = LeakWatch(section.stall_timeout_s + _SETTLE_S)
        self._num_pinned, self._shown_s = 0, 0.0
        self._aborted = Counter({role.value: 0 for role in Role})
        self._generated = metrics.ENGINE_TOKENS.labels("generated")
        self._prompt = metrics.ENGINE_TOKENS.labels("prompt")
        self._running = metrics.ENGINE_REQUESTS.labels("running")
        self._waiting = metrics.ENGINE_REQUESTS.labels("waiting")
        for cause in _SUBMISSIONS_REFUSED:
            metrics.SUBMISSIONS_REFUSED.labels(cause)

    def count(self, role: Role, output: EngineOutput) -> None:
        """Take in one request's news from one engine step."""
        if role is Role.DECODE:
            self._generated.inc(len(output.token_ids))
        elif output.stats is not None:
            self._prompt.inc(output.stats.num_computed_tokens)

    def cancel(self, role: Role, ending: Ending) -> None:
        """Count what a cancel ended in the engine; held KV caches are the KV plane's to count."""
        self._aborted[role.value] += len(ending.abort)

    def refuse(self, cause: str) -> None:
        metrics.SUBMISSIONS_REFUSED.labels(cause).inc()

    def show(
        self, load: EngineLoad, num_requests: int, now: float, refused: Mapping[str, int]
    ) -> None:
        """Export the load; `now` is monotonic, `num_requests` those open for routers, `refused`
        the peers that the worker's own socket did not take."""
        # Block 0 of every engine is never given out.
        num_usable = max(0, load.num_blocks - 1)
        in_use = (num_requests, load.num_running, load.num_waiting, load.num_held_handoffs)
        num_taken = num_usable - load.num_free_blocks
        metrics.TOTAL_BLOCKS.set(num_usable)
        metrics.FREE_BLOCKS.set(load.num_free_blocks)
        metrics.PINNED_BLOCKS.set(load.num_held_blocks)
        metrics.PINNED_BLOCK_SECONDS.inc(self._num_pinned * max(0.0, now - self._shown_s))
        self._num_pinned, self._shown_s = load.num_held_blocks, now
        metrics.LEAKED_BLOCKS.set(self._leaks.observe(num_taken, not any(in_use), now))
        metrics.HELD_HANDOFFS.set(load.num_held_handoffs)
        metrics.OPEN_REQUESTS.set(num_requests)
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._show_kv_plane(Counter(load.counts) + Counter(refused))

    def _show_kv_plane(self, counts: Mapping[str, int]) -> None:
        for prefix, (metric, known) in _BY_PREFIX.items():
            totals = dict.fromkeys(known, 0)
            for key, count in counts.items():
                if key.startswith(prefix):
                    totals[key.removeprefix(prefix)] = count
            metric.set(totals)
        metrics.KV_FAULTS.set({kind: counts.get(kind, 0) for kind in _FAULTS})
        held = {"held": counts.get("handoffs_aborted", 0)}
        metrics.CANCELLATIONS.set({**self._aborted, **held})
        metrics.HANDOFF_STAGE_SECONDS.set(times_in(counts))
