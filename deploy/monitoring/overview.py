"""The dashboard that answers: is the service well, and if not, where to look."""

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import (
    gauge,
    mean,
    quantile,
    quantiles,
    rate,
    scalings,
    series,
    total,
)

_NOW = Row(
    "Now",
    (
        Panel(
            "Health",
            "What the controller says: both pools have a Ready worker.",
            (Query(gauge("tandem_healthy")),),
            kind="stat",
            width=3,
            height=4,
            decimals=0,
            steps=(("red", 0), ("green", 1)),
            words={"0": "not healthy", "1": "healthy"},
        ),
        Panel(
            "Within both objectives",
            "Share of requests that met the TTFT and the TBT objective, last 5 minutes.",
            (Query(f"1 - {gauge('deployment:tandem_slo_miss:ratio_rate5m', objective='both')}"),),
            kind="stat",
            unit="percentunit",
            width=3,
            height=4,
            decimals=1,
            steps=(("red", 0), ("orange", 0.9), ("green", 0.95)),
        ),
        Panel(
            "Goodput",
            "Requests per second that met both objectives.",
            (Query(rate("tandem_slo_met_total", objective="both")),),
            kind="stat",
            unit="reqps",
            width=3,
            height=4,
        ),
        Panel(
            "Output",
            "Tokens per second generated for clients.",
            (Query(rate("tandem_output_tokens_total")),),
            kind="stat",
            width=3,
            height=4,
        ),
        Panel(
            "TTFT p95",
            "Arrival to first token.",
            (Query(quantile(0.95, "tandem_ttft_seconds")),),
            kind="stat",
            unit="s",
            width=3,
            height=4,
        ),
        Panel(
            "Time between tokens p95",
            "Between two answers with tokens of one request.",
            (Query(quantile(0.95, "tandem_itl_seconds")),),
            kind="stat",
            unit="s",
            width=3,
            height=4,
        ),
        Panel(
            "Ready workers",
            "Workers that requests are sent to, by pool.",
            (Query(gauge("tandem_workers", "pool", state="ready"), "{{pool}}"),),
            kind="stat",
            width=3,
            height=4,
            decimals=0,
        ),
        Panel(
            "In line",
            "Requests that wait for a placement, over all routers.",
            (Query(total("tandem_waiting_requests")),),
            kind="stat",
            width=3,
            height=4,
            decimals=0,
        ),
    ),
)

_TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests ended, by outcome",
            "stop, length and repetition are the good ones.",
            (
                Query(rate("tandem_requests_total", "outcome"), "{{outcome}}"),
                Query(rate("tandem_arrived_total"), "arrived"),
            ),
            unit="reqps",
        ),
        Panel(
            "Tokens",
            "Prompt tokens that came in and tokens generated, per second.",
            (
                Query(rate("tandem_input_tokens_total"), "input"),
                Query(rate("tandem_output_tokens_total"), "output"),
            ),
        ),
        Panel(
            "Requests in the system",
            "In line at a router, and with room reserved on workers.",
            (
                Query(total("tandem_waiting_requests"), "in line"),
                Query(total("tandem_open_reservations"), "on workers"),
            ),
            is_stacked=True,
        ),
    ),
)

_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "Arrival to first token, and the configured objective.",
            (
                *quantiles("tandem_ttft_seconds"),
                Query(gauge("tandem_objective_seconds", objective="ttft"), "objective"),
            ),
            unit="s",
        ),
        Panel(
            "Time between tokens",
            "Between two answers with tokens of one request, and the configured objective, which"
            " holds for a request's mean.",
            (
                *quantiles("tandem_itl_seconds"),
                Query(gauge("tandem_objective_seconds", objective="tbt"), "objective"),
            ),
            unit="s",
        ),
        Panel(
            "Time per output token",
            "First token to last, per token after the first.",
            quantiles("tandem_tpot_seconds"),
            unit="s",
        ),
        Panel(
            "End to end",
            "Arrival to the end of requests that finished.",
            quantiles("tandem_e2e_seconds"),
            unit="s",
        ),
        Panel(
            "Where the first token's time goes (mean)",
            "In line, then prefill with its own queue, then the hand-off with decode's first step.",
            (
                Query(mean("tandem_queue_seconds"), "queue"),
                Query(mean("tandem_prefill_seconds"), "prefill"),
                Query(mean("tandem_transfer_seconds"), "hand-off"),
            ),
            unit="s",
            is_stacked=True,
        ),
        Panel(
            "The same, p95",
            "The parts' tails do not add up to the whole's.",
            (
                Query(quantile(0.95, "tandem_queue_seconds"), "queue"),
                Query(quantile(0.95, "tandem_prefill_seconds"), "prefill"),
                Query(quantile(0.95, "tandem_transfer_seconds"), "hand-off"),
            ),
            unit="s",
        ),
    ),
)

_OBJECTIVES = Row(
    "Objectives",
    (
        Panel(
            "Attainment, 5 minutes",
            "Share of requests within an objective; one that is not configured is always met.",
            (
                Query(
                    f"1 - {gauge('deployment:tandem_slo_miss:ratio_rate5m', 'objective')}",
                    "{{objective}}",
                ),
            ),
            unit="percentunit",
            high=1,
            low=None,
        ),
        Panel(
            "Burn rate of the error budget",
            "1 uses the budget up exactly; alerts look at 1 h with 5 min (14.4), 6 h with 30 min"
            " (6).",
            (
                Query(gauge("deployment:tandem_slo_burn:rate5m", objective="both"), "5 min"),
                Query(gauge("deployment:tandem_slo_burn:rate1h", objective="both"), "1 h"),
                Query(gauge("deployment:tandem_slo_burn:rate6h", objective="both"), "6 h"),
            ),
            steps=(("orange", 6), ("red", 14.4)),
        ),
        Panel(
            "Goodput",
            "Requests held against the objectives, and those that met both.",
            (
                Query(rate("tandem_slo_requests_total"), "counted"),
                Query(rate("tandem_slo_met_total", objective="both"), "met both"),
            ),
            unit="reqps",
        ),
    ),
)

_TROUBLE = Row(
    "Trouble",
    (
        Panel(
            "Placements repeated, by cause",
            "A recovered request is late, not lost.",
            (Query(rate("tandem_recoveries_total", "cause"), "{{cause}}"),),
            unit="reqps",
            width=4,
        ),
        Panel(
            "Rejections, by cause",
            "No placement was found: clients get 429 or 503.",
            (Query(rate("tandem_rejections_total", "cause"), "{{cause}}"),),
            unit="reqps",
            width=5,
        ),
        Panel(
            "Keys refused, by cause",
            "Requests without an API key that may do what they ask: clients get 401, 403 or 429.",
            (Query(rate("tandem_keys_refused_total", "cause"), "{{cause}}"),),
            unit="reqps",
            width=5,
        ),
        Panel(
            "Cancelled at the engine, by stage",
            "Requests whose client went away or whose deadline passed.",
            (Query(rate("tandem_cancellations_total", "stage"), "{{stage}}"),),
            unit="reqps",
            width=5,
        ),
        Panel(
            "Workers lost, by pool",
            "Died, fell silent, did not start or could not hand over.",
            (Query(rate("tandem_worker_failures_total", "pool"), "{{pool}}"),),
            unit="cps",
            width=5,
        ),
        Panel(
            "Processes that answer Prometheus",
            "Every process the endpoint lists; a gap or 0 is one that did not answer.",
            (
                Query(
                    f"max by (component,role,worker_id,instance) ({series('up', job='tandem')})",
                    "{{component}} {{role}} {{worker_id}} {{instance}}",
                ),
            ),
            kind="state-timeline",
            width=24,
            height=10,
            steps=(("red", 0), ("green", 1)),
            words={"0": "down", "1": "up"},
        ),
    ),
)

OVERVIEW = Dashboard(
    "tandem-overview",
    "Tandem / Service overview",
    "Health, traffic, latency against the objectives, and what goes wrong.",
    (_NOW, _TRAFFIC, _LATENCY, _OBJECTIVES, _TROUBLE),
    marks=(scalings(),),
)
