"""The dashboard that answers: do KV caches change owner, how fast, and is every block accounted."""

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import gauge, quantile, quantiles, rate, total

_WORKER = "worker_id"

_NOW = Row(
    "Now",
    (
        Panel(
            "Moved",
            "KV cache payload that decode workers received, per second.",
            (Query(rate("tandem_kv_bytes_total", direction="received")),),
            kind="stat",
            unit="Bps",
            width=4,
            height=4,
        ),
        Panel(
            "Pulls that failed",
            "Share of pulls that ended without the whole cache.",
            (
                Query(
                    f"{rate('tandem_pulls_total', end='failed')} / {rate('tandem_pulls_total')}",
                ),
            ),
            kind="stat",
            unit="percentunit",
            width=4,
            height=4,
            steps=(("green", 0), ("orange", 0.01), ("red", 0.05)),
        ),
        Panel(
            "Pinned blocks",
            "Held for hand-offs that decode has not pulled yet.",
            (Query(total("tandem_pinned_blocks")),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
        ),
        Panel(
            "Leaked blocks",
            "Taken with no request open and nothing held: should be 0, always.",
            (Query(total("tandem_leaked_blocks")),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
            steps=(("green", 0), ("red", 1)),
        ),
        Panel(
            "Free blocks, fullest worker",
            "Smallest share of free or evictable blocks of any worker.",
            (
                Query(
                    f"min({gauge('tandem_free_blocks', _WORKER)}"
                    f" / on (worker_id) {gauge('tandem_blocks', _WORKER)})"
                ),
            ),
            kind="stat",
            unit="percentunit",
            width=4,
            height=4,
            steps=(("red", 0), ("orange", 0.05), ("green", 0.15)),
        ),
        Panel(
            "Leases that ran out, per hour",
            "Held caches freed because nobody pulled them in time.",
            (Query(f"3600 * {rate('tandem_handoffs_total', end='expired')}"),),
            kind="stat",
            width=4,
            height=4,
            steps=(("green", 0), ("orange", 1)),
        ),
    ),
)

_HANDOFFS = Row(
    "Hand-offs",
    (
        Panel(
            "Throughput by worker",
            "KV cache payload received, per second.",
            (Query(rate("tandem_kv_bytes_total", _WORKER, direction="received"), "{{worker_id}}"),),
            unit="Bps",
            is_stacked=True,
        ),
        Panel(
            "Sent and received",
            "Over all workers; they differ by what was lost or refused on the way.",
            (
                Query(rate("tandem_kv_bytes_total", "direction"), "{{direction}}"),
                Query(rate("tandem_handoff_bytes_total"), "of answered requests"),
            ),
            unit="Bps",
        ),
        Panel(
            "Received, by transport",
            "cma and shm within a host, tcp between hosts: tcp within one: both were refused.",
            (Query(rate("tandem_kv_transport_bytes_total", "transport"), "{{transport}}"),),
            unit="Bps",
            is_stacked=True,
        ),
        Panel(
            "Prompt tokens on decode, by origin",
            "transferred is the point of it all; recomputed should have been transferred.",
            (Query(rate("tandem_prompt_tokens_total", "origin"), "{{origin}}"),),
            is_stacked=True,
        ),
        Panel(
            "Prompt computed to decode's first token",
            "The whole hand-off and decode's first step.",
            quantiles("tandem_transfer_seconds"),
            unit="s",
        ),
        Panel(
            "Steps of a hand-off, median",
            "Per pull: wait, pull. Per chunk: gather, verify, scatter.",
            (Query(quantile(0.5, "tandem_handoff_stage_seconds", "stage"), "{{stage}}"),),
            unit="s",
        ),
        Panel(
            "Steps of a hand-off, p95",
            "Per pull: wait, pull. Per chunk: gather, verify, scatter.",
            (Query(quantile(0.95, "tandem_handoff_stage_seconds", "stage"), "{{stage}}"),),
            unit="s",
        ),
        Panel(
            "Pulls that ended",
            "By how.",
            (Query(rate("tandem_pulls_total", "end"), "{{end}}"),),
            unit="ops",
        ),
        Panel(
            "Held caches freed",
            "By why: released is the normal end.",
            (Query(rate("tandem_handoffs_total", "end"), "{{end}}"),),
            unit="ops",
        ),
        Panel(
            "Byte counts that differ",
            "Hand-offs for which prefill and decode disagree: should be 0, always.",
            (Query(rate("tandem_handoff_mismatches_total"), "mismatches"),),
            unit="ops",
        ),
    ),
)

_BLOCKS = Row(
    "Blocks",
    (
        Panel(
            "Taken share by worker",
            "Blocks that hold a running request or a pinned cache; the rest is free or evictable.",
            (
                Query(
                    f"1 - {gauge('tandem_free_blocks', _WORKER)}"
                    f" / on (worker_id) {gauge('tandem_blocks', _WORKER)}",
                    "{{worker_id}}",
                ),
            ),
            unit="percentunit",
            high=1,
        ),
        Panel(
            "Pinned by worker",
            "Blocks held for hand-offs.",
            (Query(gauge("tandem_pinned_blocks", _WORKER), "{{worker_id}}"),),
            decimals=0,
            is_stacked=True,
        ),
        Panel(
            "Pinned on average by worker",
            "Block-seconds per second: short holds between two scrapes are in it.",
            (Query(rate("tandem_pinned_block_seconds_total", _WORKER), "{{worker_id}}"),),
            is_stacked=True,
        ),
        Panel(
            "Held hand-offs by worker",
            "Prompts computed and waiting to be pulled.",
            (Query(gauge("tandem_held_handoffs", _WORKER), "{{worker_id}}"),),
            decimals=0,
            is_stacked=True,
        ),
        Panel(
            "Leaked by worker",
            "As of the last time the worker had nothing open.",
            (Query(gauge("tandem_leaked_blocks", _WORKER), "{{worker_id}}"),),
            decimals=0,
            steps=(("red", 1),),
        ),
    ),
)

_REFUSALS = Row(
    "Refusals and faults",
    (
        Panel(
            "Reads refused, by cause",
            "A refused read is prefilled again, never answered from wrong bytes.",
            (Query(rate("tandem_reads_refused_total", "cause"), "{{cause}}"),),
            unit="ops",
        ),
        Panel(
            "Faults of the KV plane, by kind",
            "Chunks late, foreign or damaged, frames malformed, port errors.",
            (Query(rate("tandem_kv_faults_total", "kind"), "{{kind}}"),),
            unit="ops",
        ),
        Panel(
            "Submissions refused, by cause",
            "Requests of routers that a worker did not take.",
            (Query(rate("tandem_submissions_refused_total", "cause"), "{{cause}}"),),
            unit="ops",
        ),
        Panel(
            "Pairs that do not fit",
            "Prefill and decode workers whose KV caches differ in layout: they never hand over.",
            (Query(total("tandem_refused_pairs"), "pairs"),),
            decimals=0,
        ),
        Panel(
            "Malformed frames, by plane",
            "Bytes on a port that are no valid message.",
            (Query(rate("tandem_malformed_frames_total", "plane"), "{{plane}}"),),
            unit="ops",
        ),
        Panel(
            "Broken links",
            "Connections to workers that broke with messages on them: requests open there begin"
            " again, and streams that decode had begun end.",
            (Query(rate("tandem_broken_links_total", "component"), "{{component}}"),),
            unit="ops",
        ),
        Panel(
            "Peers refused, by cause",
            "Connections to a socket of ours by somebody without a key of the deployment.",
            (Query(rate("tandem_peers_refused_total", "cause"), "{{cause}}"),),
            unit="ops",
        ),
    ),
)

_ENGINES = Row(
    "Engines",
    (
        Panel(
            "Busy share by worker",
            "Share of time with at least one request open.",
            (Query(rate("tandem_busy_seconds_total", _WORKER), "{{worker_id}}"),),
            unit="percentunit",
        ),
        Panel(
            "Tokens per second by worker",
            "Computed by the engine: prompt as a prefill worker, generated as a decode worker.",
            (
                Query(
                    rate("tandem_engine_tokens_total", "worker_id,kind"), "{{worker_id}} {{kind}}"
                ),
            ),
        ),
        Panel(
            "Requests in the engines",
            "Running or waiting, over all workers of a role.",
            (Query(total("tandem_engine_requests", "role,state"), "{{role}} {{state}}"),),
            decimals=0,
        ),
        Panel(
            "Open requests by worker",
            "Requests of routers that are open there.",
            (Query(gauge("tandem_open_requests", _WORKER), "{{worker_id}}"),),
            decimals=0,
        ),
        Panel(
            "Workers that routers reach",
            "Workers that answer, by pool and router.",
            (Query(gauge("tandem_ready_links", "pool,instance"), "{{pool}} at {{instance}}"),),
            decimals=0,
        ),
    ),
)

KV_PLANE = Dashboard(
    "tandem-kv-plane",
    "Tandem / KV plane",
    "Hand-offs, the blocks they pin, refusals and faults, and the engines on both sides.",
    (_NOW, _HANDOFFS, _BLOCKS, _REFUSALS, _ENGINES),
)
