"""How long things took by vLLM's own metrics of the engines behind a router."""

from collections.abc import Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

from tests.served import Served

TRANSFER = "vllm:nixl_xfer_time_seconds"
POST = "vllm:nixl_post_time_seconds"
REQUEST = "vllm:e2e_request_latency_seconds"

# Cumulative counts by a histogram's upper bounds, and the sum of what it has seen, by its name.
Times = dict[str, dict[str, float]]


def counted(engines: Sequence[Served], *names: str) -> Times:
    """Return what the engines' histograms of these names have seen so far."""
    found: Times = {}
    for engine in engines:
        text = engine.client.get("/metrics").text
        for family in text_string_to_metric_families(text):
            if family.name in names:
                counts = found.setdefault(family.name, {})
                for sample in family.samples:
                    key = sample.labels.get("le", sample.name.removeprefix(family.name))
                    counts[key] = counts.get(key, 0.0) + sample.value
    return found


def since(before: Times, after: Times) -> Times:
    """Return what was counted between the two."""
    return {
        name: {key: value - before.get(name, {}).get(key, 0.0) for key, value in counts.items()}
        for name, counts in after.items()
    }


def added(each: Sequence[Times], name: str) -> dict[str, float]:
    """Return one histogram over several cells."""
    total: dict[str, float] = {}
    for times in each:
        for key, value in times.get(name, {}).items():
            total[key] = total.get(key, 0.0) + value
    return total


def mean_s(histogram: Mapping[str, float]) -> float:
    return histogram["_sum"] / histogram["_count"]


def quantile_s(histogram: Mapping[str, float], share: float) -> float:
    """Return a quantile as Prometheus estimates it: evenly spread within its bucket."""
    bounds = sorted((float(key), count) for key, count in histogram.items() if key[0] != "_")
    wanted = share * histogram["_count"]
    low_s, below = 0.0, 0.0
    for bound_s, count in bounds:
        if count >= wanted > 0:
            if bound_s == float("inf"):
                return low_s
            return low_s + (bound_s - low_s) * (wanted - below) / (count - below)
        low_s, below = bound_s, count
    raise ValueError("no transfers were counted")
