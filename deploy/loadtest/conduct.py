"""A load test from its question to its document: build, send, compare, measure, write."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from cluster.errors import ConfigError, TandemError
from deploy.loadtest import reference as references
from deploy.loadtest.document import Question, document_of
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.live import shown_ms, watching
from deploy.loadtest.pace import prepare
from deploy.loadtest.report import page
from deploy.loadtest.run import LoadRun, run_load
from deploy.loadtest.words import FORMAT, Document, Send, Tokenizer
from deploy.loadtest.workload import build

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Site:
    """The endpoint with what prompts for it are made with; `context` is in tokens."""

    endpoint: Endpoint
    tokenizer: Tokenizer
    context: int


def sends_of(site: Site, question: Question) -> list[Send]:
    """Return the workload's requests, the same for the same seed."""
    return build(question.spec, site.tokenizer, site.context, Random(question.seed))


def measure(site: Site, question: Question, sends: Sequence[Send]) -> LoadRun:
    """Send everything; answers are compared with the reference, if there is one."""
    endpoint = site.endpoint
    reference = None
    if question.verify is not None:
        reference = references.read(Path(question.verify), endpoint)
        references.require_all(reference, sends)
    jobs = prepare(endpoint, sends, site.tokenizer)
    with watching(f"{question.label}: {question.spec.text}") as show:
        run = run_load(endpoint, jobs, question.plan, show)
    if reference is not None:
        references.compare(run.records, reference)
    return run


def conduct(site: Site, question: Question, record: Path | None, say: Say) -> Document:
    """Run one test and return its document; `record` gets the answers as a reference."""
    sends = sends_of(site, question)
    last_s = sends[-1].at_s
    paced = f"over {last_s:.0f} s" if question.plan.concurrency is None else "as answers come"
    say(f"{len(sends)} requests {paced} to {site.endpoint.url}, model {site.endpoint.model}")
    if record is not None or question.verify is not None:
        question = replace(question, plan=replace(question.plan, keeps_text=True))
    run = measure(site, question, sends)
    if record is not None:
        say(f"{record}: {references.write(record, site.endpoint, run.records)} answers recorded")
    return document_of(question, site.endpoint, run)


def require_writable(path: Path) -> None:
    """Raise `ConfigError`, before minutes of load, if nothing can be written there."""
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise TandemError(f"{path}: {error.strerror}") from None


def write_all(document: Document, output: Path, html: Path | None) -> None:
    write(output, json.dumps(document, separators=(",", ":")) + "\n")
    if html is not None:
        write(html, page([document]))


def read_document(path: Path) -> Document:
    """Raise `ConfigError` if the file is no run document."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a run of format {FORMAT}")
    return document


def errors(document: Document) -> list[str]:
    """Return what makes the run a failure, one line each."""
    late = document["scheduling"]
    lines = list(document["faults"])
    if not late["kept_up"]:
        lines.insert(
            0,
            f"the client could not keep up: requests left {shown_ms(late['p99_s'])} late at p99, "
            f"more than {shown_ms(late['limit_s'])}: these figures are the client's own; give it "
            "a core or send less",
        )
    return lines


def rows(document: Document) -> list[tuple[str, str]]:
    """Return the run's summary as (what, figure)."""
    summary, late = document["summary"], document["scheduling"]
    failed = ", ".join(f"{summary[key]} {key}" for key in ("lost", "truncated", "wrong"))
    lines = [
        ("requests", f"{summary['requests']}: {summary['completed']} completed, {failed}"),
        ("duration", f"{summary['duration_s']:.1f} s"),
        ("throughput", _throughput(summary)),
    ]
    for name, key in (
        ("TTFT", "ttft_s"),
        ("TPOT", "tpot_s"),
        ("inter-token", "itl_s"),
        ("end to end", "e2e_s"),
        ("per output token", "normalised_s"),
    ):
        lines.append((f"{name} mean / p50 / p90 / p99", _spread(summary[key])))
    lines += _service_level(summary, document["settings"])
    used = summary["worker_seconds"]
    if used is not None:
        pools = f"{used['prefill']:.0f} prefill, {used['decode']:.0f} decode"
        cost = "" if summary["cost"] is None else f", cost {summary['cost']:.4g}"
        lines.append(("worker-seconds", f"{used['total']:.0f}: {pools}{cost}"))
    sent_late = " / ".join(shown_ms(late[key]) for key in ("p50_s", "p99_s", "max_s"))
    return [*lines, ("sent late p50 / p99 / max", sent_late)]


def _throughput(summary: Mapping[str, Any]) -> str:
    rates = [summary[f"{each}_rate"] for each in ("request", "output_token", "prompt_token")]
    return f"{rates[0]:.2f} requests/s, {rates[1]:.0f} output and {rates[2]:.0f} prompt tokens/s"


def _spread(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return "-"
    return " / ".join(f"{figures[key] * 1e3:.1f}" for key in ("mean", "p50", "p90", "p99")) + " ms"


def _service_level(
    summary: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    asked = [(name, settings[f"slo_{name.lower()}_s"]) for name in ("TTFT", "TPOT")]
    if all(objective is None for _, objective in asked):
        return []
    terms = ", ".join(f"{name} {shown_ms(value)}" for name, value in asked if value is not None)
    met = summary["slo"]
    share = "-" if met["attainment"] is None else f"{met['attainment']:.1%}"
    lines = [(f"met {terms}", f"{share}, goodput {met['goodput']:.2f} requests/s")]
    if summary["fluidity"] is not None:
        lines.append(("fluidity index", f"{summary['fluidity']['index']:.4f}"))
    return lines
