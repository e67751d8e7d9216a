"""The dashboard that answers: what does the autoscaler see, what did it decide, what came of it."""

from deploy.monitoring.panels import Dashboard, Panel, Query, Row
from deploy.monitoring.queries import gauge, mean, quantile, rate, scalings, total

_NOW = Row(
    "Now",
    (
        Panel(
            "Wanted",
            "Size each pool is brought to.",
            (Query(gauge("tandem_wanted_workers", "pool"), "{{pool}}"),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
        ),
        Panel(
            "Ready",
            "Workers that requests are sent to.",
            (Query(gauge("tandem_workers", "pool", state="ready"), "{{pool}}"),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
        ),
        Panel(
            "Ready over target ratio",
            "Prefill per decode worker, measured against what the policy keeps; 1 is on target.",
            (Query(f"{gauge('tandem_ready_ratio')} / {gauge('tandem_target_ratio')}"),),
            kind="stat",
            width=4,
            height=4,
            decimals=2,
            steps=(("orange", 0), ("green", 0.8), ("orange", 1.25)),
        ),
        Panel(
            "No room",
            "Reasons for which workers wait for a place; `tandem status` names them.",
            (Query(gauge("tandem_unplaced")),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
            steps=(("green", 0), ("orange", 1)),
        ),
        Panel(
            "Controllers so far",
            "Rises by one whenever a controller takes over.",
            (Query(gauge("tandem_controller_epoch")),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
        ),
        Panel(
            "Routers that follow",
            "Routers that take their list of workers from this controller.",
            (Query(gauge("tandem_routers")),),
            kind="stat",
            width=4,
            height=4,
            decimals=0,
        ),
    ),
)

_SIGNAL = Row(
    "Signal",
    (
        Panel(
            "Signal over its target",
            "What sizes the pools, over what the Ready workers should carry of it: above 1.1 grows,"
            " below 0.85 shrinks, by default.",
            (
                Query(
                    f"{gauge('tandem_signal', 'signal')} / on (signal)"
                    f" {gauge('tandem_signal_target', 'signal')}",
                    "{{signal}}",
                ),
            ),
            steps=(("orange", 1.1),),
        ),
        Panel(
            "Tokens per second",
            "Measured by the workers over the metric window, and the target of the signal used.",
            (
                Query(gauge("tandem_signal", "signal", signal=".+_tps"), "{{signal}}"),
                Query(
                    gauge("tandem_signal_target", "signal", signal=".+_tps"), "target of {{signal}}"
                ),
            ),
        ),
        Panel(
            "Utilisation",
            "Share of time in which a serving worker had a request open.",
            (
                Query(gauge("tandem_signal", "signal", signal=".+_util"), "{{signal}}"),
                Query(
                    gauge("tandem_signal_target", "signal", signal=".+_util"),
                    "target of {{signal}}",
                ),
            ),
            unit="percentunit",
            high=1,
        ),
        Panel(
            "Latency that the tiers watch",
            "At the watched quantile, and the objectives: above, both pools grow.",
            (
                Query(gauge("tandem_signal", "signal", signal="ttft|tbt"), "{{signal}}"),
                Query(gauge("tandem_objective_seconds", "objective"), "objective {{objective}}"),
            ),
            unit="s",
        ),
        Panel(
            "Arrivals",
            "Requests per second over the arrival window: bursts show here first.",
            (Query(gauge("tandem_signal", signal="arrivals"), "arrivals"),),
            unit="reqps",
        ),
        Panel(
            "Ratio",
            "Prefill workers per decode worker: Ready ones, and what the policy keeps.",
            (
                Query(gauge("tandem_ready_ratio"), "ready"),
                Query(gauge("tandem_target_ratio"), "target"),
            ),
            decimals=2,
        ),
    ),
)


def _sizes(pool: str) -> Panel:
    return Panel(
        f"{pool.capitalize()} pool",
        "Asked by what drives the decision (raw), left of it after every limit (final), wanted"
        " now, Ready, and the bounds.",
        (
            Query(gauge("tandem_raw_target_workers", pool=pool), "raw target"),
            Query(gauge("tandem_final_target_workers", pool=pool), "final target"),
            Query(gauge("tandem_wanted_workers", pool=pool), "wanted"),
            Query(gauge("tandem_workers", pool=pool, state="ready"), "ready"),
            Query(gauge("tandem_pool_limit_workers", "bound", pool=pool), "{{bound}}"),
        ),
        width=12,
        decimals=0,
    )


def _states(pool: str) -> Panel:
    return Panel(
        f"{pool.capitalize()} workers by state",
        "Every worker that belongs to the pool.",
        (Query(gauge("tandem_workers", "state", pool=pool), "{{state}}"),),
        width=12,
        decimals=0,
        is_stacked=True,
    )


_POOLS = Row("Pools", (_sizes("prefill"), _sizes("decode"), _states("prefill"), _states("decode")))

_DECISIONS = Row(
    "Decisions and what came of them",
    (
        Panel(
            "Decisions per hour, by action",
            "`tandem decisions` says for each what it saw and why.",
            (Query(f"3600 * {rate('tandem_decisions_total', 'action')}", "{{action}}"),),
        ),
        Panel(
            "The same, by driver",
            "What the sizes rest on.",
            (Query(f"3600 * {rate('tandem_decisions_total', 'driver')}", "{{driver}}"),),
        ),
        Panel(
            "Actions per hour, by kind",
            "Cheapest first: restore, flip, activate a standby, start.",
            (Query(f"3600 * {rate('tandem_actions_total', 'action')}", "{{action}}"),),
        ),
        Panel(
            "How long actions take (mean)",
            "Start, activate and flip until Ready; drain from taken out to stopped.",
            (Query(mean("tandem_action_seconds", "action"), "{{action}}"),),
            unit="s",
        ),
        Panel(
            "The same, p95",
            "From a histogram: the upper bound of a bucket at worst.",
            (Query(quantile(0.95, "tandem_action_seconds", "action"), "{{action}}"),),
            unit="s",
        ),
        Panel(
            "Workers lost per hour, and without room",
            "Lost ones are replaced at once, with a growing pause while that fails.",
            (
                Query(f"3600 * {rate('tandem_worker_failures_total', 'pool')}", "lost, {{pool}}"),
                Query(total("tandem_unplaced"), "reasons without room"),
            ),
        ),
    ),
)

AUTOSCALER = Dashboard(
    "tandem-autoscaler",
    "Tandem / Autoscaler",
    "The signal against its target, both pools, decisions, and what became of them.",
    (_NOW, _SIGNAL, _POOLS, _DECISIONS),
    marks=(scalings(),),
)
