"""What the report of a run and the comparison of several have in common. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.loadtest import figures
from deploy.loadtest.chart import Band
from deploy.loadtest.markup import Html, el

Run = Mapping[str, Any]

LATENCIES = (
    ("ttft_s", "Time to first token (TTFT)"),
    ("tpot_s", "Time per output token (TPOT)"),
    ("itl_s", "Inter-token latency (ITL)"),
    ("e2e_s", "End to end"),
    ("normalised_s", "End to end per token"),
)
# An objective so many times above all values is not drawn.
_FAR = 4.0
SPREAD = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a summary: where it lies, how it is written, and which way is better.

    `better` is -1 where less is better, 1 where more is, 0 where neither.
    """

    name: str
    path: tuple[str, ...]
    write: Callable[[float | None], str]
    better: int = 0

    def of(self, summary: Mapping[str, Any]) -> float | None:
        """Return the number, None where the run does not know it."""
        value: Any = summary
        for key in self.path:
            value = None if value is None else value.get(key)
        return None if value is None else value + 0


FIGURES = (
    Figure("Requests", ("requests",), figures.number),
    Figure("Completed", ("completed",), figures.number),
    Figure("Lost", ("lost",), figures.number, -1),
    Figure("Truncated", ("truncated",), figures.number, -1),
    Figure("Wrong", ("wrong",), figures.number, -1),
    Figure("Duration", ("duration_s",), figures.seconds),
    Figure("Offered", ("offered_rate",), figures.rate),
    Figure("Completed per second", ("request_rate",), figures.rate, 1),
    Figure("Output tokens per second", ("output_token_rate",), figures.rate, 1),
    Figure("Prompt tokens per second", ("prompt_token_rate",), figures.rate, 1),
    Figure("Goodput", ("slo", "goodput"), figures.rate, 1),
    Figure("SLO attainment", ("slo", "attainment"), figures.percent, 1),
    Figure("TTFT objective met", ("slo", "ttft_attainment"), figures.percent, 1),
    Figure("TPOT objective met", ("slo", "tpot_attainment"), figures.percent, 1),
    Figure("Fluidity index", ("fluidity", "index"), figures.percent, 1),
    Figure("Worker time, prefill", ("worker_seconds", "prefill"), figures.seconds, -1),
    Figure("Worker time, decode", ("worker_seconds", "decode"), figures.seconds, -1),
    Figure("Worker time, total", ("worker_seconds", "total"), figures.seconds, -1),
    Figure("Cost", ("cost",), figures.number, -1),
)


def objectives(run: Run) -> str:
    """Return the objectives in words."""
    limits = (("TTFT", "slo_ttft_s"), ("TPOT", "slo_tpot_s"))
    given = [
        f"{name} up to {figures.tick_seconds(run['settings'][key])}"
        for name, key in limits
        if run["settings"][key] is not None
    ]
    return ", ".join(given) or "none"


def settings(run: Run) -> list[tuple[str, str]]:
    """Return everything the run was asked, as (what, value)."""
    workload, endpoint, asked = run["workload"], run["endpoint"], run["settings"]
    scales = (f"{name} x {workload[f'{name}_scale']:g}" for name in ("time", "rate"))
    length = workload["length_scale"]
    fitted = "lengths as far down as the context demands"
    is_open = asked["mode"] == "open"
    return [
        ("Workload", workload["spec"]),
        ("Scaled", ", ".join([*scales, fitted if length is None else f"length x {length:g}"])),
        (
            "Requests",
            f"{workload['requests']:,} over {figures.clock(round(workload['duration_s'], 1))}",
        ),
        (
            "Tokens asked for",
            f"{workload['prompt_tokens']:,} in prompts, {workload['output_tokens']:,} in answers",
        ),
        ("Seed", str(workload["seed"])),
        ("Endpoint", endpoint["url"]),
        ("Model", f"{endpoint['model']}, context {figures.number(endpoint['context_tokens'])}"),
        ("API", endpoint["api"]),
        ("Sent", "at their times" if is_open else f"{asked['concurrency']} at a time"),
        ("Objectives", objectives(run)),
        ("Price of a worker hour", figures.number(asked["worker_hour_price"])),
        ("Answers compared with", asked["verify"] or "nothing"),
        ("Started", str(run["started_at"])),
    ]


def limit_near(run: Run, name: str, highest: float) -> tuple[float | None, str]:
    """Return the objective for a latency, if it is worth drawing, and else a note on it.

    One that lies far above all values would press these together.
    """
    limit: float | None = run["settings"].get(f"slo_{name}")
    if limit is None or limit <= _FAR * highest:
        return limit, ""
    return None, f"The objective of {figures.tick_seconds(limit)} lies far above."


def bands(run: Run) -> list[Band]:
    return [Band(phase["begin_s"], phase["end_s"], phase["name"]) for phase in run["phases"]]


def badge(is_good: bool, text: str) -> Html:
    """Return a verdict in colour, sign and words."""
    sign = "✓ " if is_good else "✗ "
    return el("span", sign, text, class_=f"badge {'good' if is_good else 'bad'}")


def verdicts(run: Run) -> list[Html]:
    """Return the run's state, its faults and its client's punctuality."""
    num_faults = len(run["faults"])
    timing = run["scheduling"]
    late = (
        f"p99 {figures.seconds(timing['p99_s'])}, limit {figures.tick_seconds(timing['limit_s'])}"
    )
    kept_up = "client kept up" if timing["kept_up"] else "client did NOT keep up"
    return [
        badge(run["state"] == "complete", f"run {run['state']}"),
        badge(not num_faults, f"{num_faults or 'no'} fault{'' if num_faults == 1 else 's'}"),
        badge(timing["kept_up"], f"{kept_up} (sent late by {late})"),
    ]


def section(title: str, *content: object, note: str = "") -> Html:
    paragraph = el("p", note, class_="note") if note else None
    return el("section", el("h2", title), paragraph, content)  # type: ignore[arg-type]


def most(points: Sequence[tuple[float, float | None]]) -> float:
    return max((value for _, value in points if value is not None), default=0.0)
