"""Every metric this project exports, declared once: name, labels, help with unit."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

MALFORMED_FRAMES = Counter(
    "tandem_malformed_frames", "Frames dropped because they are not valid messages", ["plane"]
)
PROMPT_TOKENS = Counter(
    "tandem_prompt_tokens",
    "Prompt tokens on decode by origin: transferred, reused (cached there), recomputed, or local"
    " (decode's own to compute)",
    ["origin"],
)
OUTPUT_TOKENS = Counter("tandem_output_tokens", "Tokens generated for clients")
REQUESTS = Counter("tandem_requests", "Requests ended, by outcome", ["outcome"])
HANDOFF_BYTES = Counter("tandem_handoff_bytes", "KV bytes pulled by decode workers")
HANDOFF_MISMATCHES = Counter("tandem_handoff_mismatches", "Hand-offs whose two byte counts differ")
RECOVERIES = Counter("tandem_recoveries", "Placements repeated, by cause", ["cause"])
TTFT_SECONDS = Histogram("tandem_ttft_seconds", "Arrival to first token", buckets=_SECONDS)
ITL_SECONDS = Histogram("tandem_itl_seconds", "Time between tokens", buckets=_SECONDS)
TRANSFER_SECONDS = Histogram("tandem_transfer_seconds", "Pull of a KV cache", buckets=_SECONDS)
OPEN_RESERVATIONS = Gauge("tandem_open_reservations", "Reservations held by this router")
PINNED_BLOCKS = Gauge("tandem_pinned_blocks", "KV blocks held for hand-offs", ["worker"])
FREE_BLOCKS = Gauge("tandem_free_blocks", "KV blocks free in the engine's pool", ["worker"])
