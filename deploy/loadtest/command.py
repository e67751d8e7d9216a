"""`tandem loadtest` and `tandem loadtest compare`: their flags and what they run."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, Unavailable
from deploy.loadtest.words import Document, Slo, WorkloadSpec

DEFAULT_OUTPUT = Path("loadtest.json")
_SHOWN_FAULTS = 5
_INTERRUPTED = 130


def add_command(commands: Any) -> None:
    """Add the command to the parsers of `tandem`."""
    about = "put load on an endpoint, ours or any OpenAI-compatible one, and report"
    command = commands.add_parser(
        "loadtest",
        help=about,
        description=about,
        usage="tandem loadtest [flags] | tandem loadtest compare A.json B.json -o report.html",
        allow_abbrev=False,
    )
    command.set_defaults(run=run_loadtest, parser=command, config=None)
    for add in (_add_endpoint, _add_workload, _add_measures, _add_output, _add_search):
        add(command)
    compare = command.add_subparsers(metavar="compare").add_parser(
        "compare",
        help="draw several runs in one report",
        usage="tandem loadtest compare A.json B.json ... -o report.html",
        allow_abbrev=False,
    )
    compare.set_defaults(run=run_compare, parser=compare)
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    compare.add_argument("-o", dest="report", type=Path, required=True, metavar="FILE.html")


def _add_endpoint(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("endpoint")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--url", metavar="URL", help="where it is (default: the deployment --name)")
    where.add_argument("--name", default="tandem", help="a deployment here (default: tandem)")
    group.add_argument("--model", help="the model's name there (default: its first one)")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="the model's folder or Hugging Face name, if its own is not what the endpoint says",
    )
    group.add_argument("--context", type=_count, metavar="TOKENS", help="if it does not say so")
    group.add_argument("--api", choices=("completions", "chat"), default="completions")
    group.add_argument("--header", action="append", default=[], type=_header, metavar="NAME:VALUE")
    group.add_argument("--api-key-file", metavar="FILE", help="its text goes out as bearer token")
    group.add_argument("--cacert", metavar="FILE", help="the endpoint's own certificate (PEM)")
    group.add_argument(
        "--body",
        type=_mapping,
        default={},
        metavar="JSON",
        help="fields laid over every request's, null takes one out",
    )
    group.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="per request")


def _add_workload(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("workload")
    group.add_argument(
        "--workload",
        default="azure",
        metavar="SPEC",
        help="KIND[:key=value,...], or 'help' (default: azure)",
    )
    for flag, about in (
        ("--time-scale", "arrivals come this many times as fast"),
        ("--rate-scale", "this many times as many requests in the same time"),
        ("--length-scale", "lengths times this (default: as the model's context demands)"),
    ):
        default = None if flag == "--length-scale" else 1.0
        group.add_argument(flag, type=_positive, default=default, metavar="X", help=about)
    group.add_argument("--requests", type=_count, metavar="N", help="only the first N")
    group.add_argument("--duration", type=_positive, metavar="S", help="only those of S seconds")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--concurrency",
        type=_count,
        metavar="N",
        help="closed loop: keep N requests under way (default: open loop, on schedule)",
    )


def _add_measures(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("measures")
    for flag, about in (
        ("--slo-ttft", "objective for the time to the first token"),
        ("--slo-tpot", "objective for the time per output token"),
        ("--phase", "report parts of this length (default: the workload's own phases)"),
    ):
        group.add_argument(flag, type=_positive, metavar="S", help=about)
    group.add_argument("--worker-hour-price", type=_positive, metavar="PRICE")
    group.add_argument(
        "--late-limit",
        type=_positive,
        default=0.02,
        metavar="S",
        help="fail if requests leave later than this at p99 (default: 0.02)",
    )
    answers = group.add_mutually_exclusive_group()
    answers.add_argument("--record", type=Path, metavar="FILE", help="keep answers as a reference")
    answers.add_argument("--verify", type=Path, metavar="FILE", help="compare answers with it")


def _add_output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument(
        "--output",
        "-o",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE.json",
        help=f"every request and all figures (default: {DEFAULT_OUTPUT})",
    )
    group.add_argument("--html", type=Path, metavar="FILE.html", help="the report")
    group.add_argument("--label", help="the run's name in comparisons (default: the endpoint)")


def _add_search(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("search")
    group.add_argument(
        "--find-goodput",
        action="store_true",
        help="find the highest rate at which enough requests meet both objectives",
    )
    group.add_argument("--share", type=_share, default=0.9, help="how many (default: 0.9)")
    group.add_argument(
        "--start-rate", type=_positive, default=1.0, metavar="R", help="requests/s (default: 1)"
    )
    group.add_argument("--precision", type=_share, default=0.05, help="of the rate (default: 0.05)")
    group.add_argument(
        "--probe", type=_positive, default=20.0, metavar="S", help="per rate (default: 20)"
    )
    group.add_argument(
        "--most-requests", type=_count, default=2000, metavar="N", help="per rate (default: 2000)"
    )


def run_loadtest(_config: object, parsed: argparse.Namespace) -> int:
    """Run the test; return 1 for lost, truncated or wrong requests, or a client that was late."""
    from deploy.loadtest import conduct
    from deploy.loadtest.goodput import find
    from deploy.loadtest.search import SearchPlan
    from deploy.loadtest.workload import usage

    if parsed.workload == "help":
        _say(usage())
        return 0
    if parsed.find_goodput and (parsed.record is not None or parsed.verify is not None):
        raise ConfigError(
            "--find-goodput sends other requests at every rate: it does not go with --record or "
            "--verify"
        )
    for path in (parsed.output, parsed.html, parsed.record):
        if path is not None:
            conduct.require_writable(path)
    site = _site(parsed)
    question = _question(parsed, site.endpoint.url)
    if parsed.find_goodput:
        plan = SearchPlan(
            parsed.start_rate,
            parsed.share,
            parsed.precision,
            max_requests=parsed.most_requests,
            probe_s=parsed.probe,
        )
        document = find(site, question, plan, _say)
    else:
        document = conduct.conduct(site, question, parsed.record, _say)
    conduct.write_all(document, parsed.output, parsed.html)
    return _conclude(document, parsed)


def _conclude(document: Document, parsed: argparse.Namespace) -> int:
    from deploy.loadtest import conduct

    show(conduct.rows(document))
    for path in (parsed.output, parsed.html):
        if path is not None:
            _say(f"{path} written")
    if document["state"] == "interrupted":
        return _INTERRUPTED
    if "probes" not in document:
        lines = conduct.errors(document)
    else:
        # A probe over the limit is no failure, it is what was looked for.
        lines = document["faults"][:1] if document["state"] != "complete" else []
    for line in lines[:_SHOWN_FAULTS]:
        print(f"tandem: error: {line}", file=sys.stderr)
    if len(lines) > _SHOWN_FAULTS:
        more = len(lines) - _SHOWN_FAULTS
        print(f"tandem: error: and {more} more, see {parsed.output}", file=sys.stderr)
    return 1 if lines else 0


def run_compare(_config: object, parsed: argparse.Namespace) -> int:
    """Draw the runs into one report."""
    from deploy.loadtest import conduct
    from deploy.loadtest.report import page

    runs = [conduct.read_document(path) for path in parsed.runs]
    conduct.write(parsed.report, page(runs))
    _say(f"{parsed.report} written")
    return 0


def show(rows: list[tuple[str, str]]) -> None:
    """Print (what, figure) as two columns."""
    width = max(len(name) for name, _ in rows)
    print()
    for name, figure in rows:
        print(f"  {name.ljust(width)}  {figure}")
    print(flush=True)


def _site(parsed: argparse.Namespace) -> Any:
    from dataclasses import replace

    from deploy.loadtest.conduct import Site
    from deploy.loadtest.endpoint import discover
    from deploy.loadtest.prompts import FileTokenizer

    endpoint = discover(_access(parsed), parsed.model)
    endpoint = replace(endpoint, api=parsed.api, extra=parsed.body)
    context = parsed.context or endpoint.context_tokens
    if context is None:
        raise ConfigError(f"{endpoint.url} does not say the model's context: give --context")
    tokenizer = parsed.tokenizer or endpoint.tokenizer or endpoint.model
    return Site(endpoint, FileTokenizer(tokenizer), context)


def _access(parsed: argparse.Namespace) -> Any:
    from deploy.access import Access
    from deploy.state import DeploymentState

    if parsed.url is not None:
        return Access(parsed.url, parsed.api_key_file, parsed.cacert, dict(parsed.header))
    state = DeploymentState.read(parsed.name)
    if state is None:
        raise Unavailable(f"no deployment {parsed.name!r} runs here: start one, or give --url")
    key = parsed.api_key_file or state.operator_key
    certificate = parsed.cacert or state.certificate
    return Access(state.url, key, certificate, dict(parsed.header))


def _question(parsed: argparse.Namespace, url: str) -> Any:
    from deploy.loadtest.document import Question
    from deploy.loadtest.measures import Terms
    from deploy.loadtest.run import LoadPlan

    spec = WorkloadSpec(
        parsed.workload,
        parsed.time_scale,
        parsed.rate_scale,
        parsed.length_scale,
        parsed.requests,
        parsed.duration,
    )
    return Question(
        spec,
        parsed.seed,
        LoadPlan(parsed.concurrency, parsed.timeout),
        Terms(Slo(parsed.slo_ttft, parsed.slo_tpot), parsed.worker_hour_price),
        parsed.label or url,
        parsed.late_limit,
        parsed.phase,
        str(parsed.verify) if parsed.verify is not None else None,
    )


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not like 'Authorization: Bearer KEY'")
    return name.strip().lower(), value.strip()


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _say(line: str) -> None:
    print(line, flush=True)
