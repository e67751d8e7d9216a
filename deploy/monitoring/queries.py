"""PromQL for one deployment's dashboard, put together from metric names and labels."""

from deploy.monitoring.panels import Query

_QUANTILES = (0.5, 0.95, 0.99)
# Grafana's: four scrapes, or the step of the graph if that is longer.
WINDOW = "$__rate_interval"


def series(metric: str, **matchers: str) -> str:
    """Return a selector of the dashboard's deployment; a matcher's value may be a pattern."""
    wanted = {"deployment": "$deployment", **matchers}
    inside = ",".join(f'{label}{_operator(value)}"{value}"' for label, value in wanted.items())
    return f"{metric}{{{inside}}}"


def _operator(value: str) -> str:
    return "=~" if set(value) & set("|.*+") else "="


def total(metric: str, by: str = "", **matchers: str) -> str:
    """Return a gauge summed over processes, apart by the labels `by` (comma-separated)."""
    return f"sum{_grouping(by)}({series(metric, **matchers)})"


def rate(metric: str, by: str = "", **matchers: str) -> str:
    """Return a counter's increase per second, summed over processes."""
    return f"sum{_grouping(by)}(rate({series(metric, **matchers)}[{WINDOW}]))"


def _grouping(by: str) -> str:
    return f" by ({by}) " if by else ""


def mean(metric: str, by: str = "") -> str:
    """Return a histogram's mean."""
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def quantile(q: float, metric: str, by: str = "") -> str:
    """Return a histogram's quantile over all processes."""
    labels = f"le,{by}" if by else "le"
    return f"histogram_quantile({q:g}, {rate(metric + '_bucket', labels)})"


def quantiles(metric: str) -> tuple[Query, ...]:
    """Return the median and two tails of a histogram."""
    return tuple(Query(quantile(q, metric), f"p{100 * q:g}") for q in _QUANTILES)


def gauge(metric: str, by: str = "", **matchers: str) -> str:
    """Return a gauge that one process exports, without the labels that name the process."""
    return f"max{_grouping(by)}({series(metric, **matchers)})"


def scalings() -> Query:
    """Return the moments at which a pool got another size to go to, as marks for a dashboard."""
    wanted = series("tandem_wanted_workers")
    return Query(f"sum by (pool) (changes({wanted}[{WINDOW}])) > 0", "scaling")
