"""`make bench-peer`: the same requests through ours and through vLLM's NixlConnector, 1P1D each.

The stacks of `make bench-goodput` take turns with slices of one workload, alone on the machine
while they are measured, and get the same prompts at the same moments. One core per engine. After
each slice come requests one at a time, of which it is known how long their prompt took on the
prefill side: what their second token waited for beside that and decode's steps is the hand-off.
"""

import argparse
import itertools
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from deploy.loadtest.measures import percentile
from deploy.loadtest.words import RequestRecord
from tests.benchmarks import engine_settings
from tests.benchmarks.goodput import Plan, end, measure, run, write
from tests.benchmarks.goodput_report import Workload
from tests.benchmarks.objectives import record_of
from tests.benchmarks.sections import table, write_section
from tests.benchmarks.serve import SETTLE_S, token_times
from tests.benchmarks.stacks import TITLES, Stack
from tests.benchmarks.vllm_times import (
    POST,
    REQUEST,
    TRANSFER,
    added,
    counted,
    mean_s,
    quantile_s,
    since,
)
from tests.served import Served

OURS, PEER = "tandem", "nixl"
# Decode steps until the second token: the peer's decode engine samples the first one, too.
NUM_STEPS = {OURS: 1, PEER: 2}
NUM_SINGLE, SINGLE_TOKENS = 40, 10
RATE, SECONDS, ROUNDS = 0.5, 50.0, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 32

File = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One thing that is compared: p50 and p99 of each stack, in seconds; less is better."""

    name: str
    ours: tuple[float, float]
    theirs: tuple[float, float]

    @property
    def is_better(self) -> bool:
        return all(mine < other for mine, other in zip(self.ours, self.theirs, strict=True))

    def row(self) -> list[str]:
        cells = [f"{1e3 * value:.1f}" for value in (*self.ours, *self.theirs)]
        return [self.name, *cells, "better" if self.is_better else "NOT better"]


def measure_both(stack: Stack, served: Served, plan: Plan, number: int, out: Path) -> None:
    """Send a slice of the workload, then requests one at a time; keep what they come to."""
    measure(stack, served, plan, number, out)
    rng = Random(number)
    handoffs = [handoff_s(stack, served, rng) for _ in range(NUM_SINGLE)]
    write(out, f"alone-{stack.name}-{number}", {"stack": stack.name, "handoffs_s": handoffs})


def handoff_s(stack: Stack, served: Served, rng: Random) -> float:
    """Return what a second token waited for beside the computing of its prompt and decode's steps:
    front-end, routing, hand-off."""
    prompt = [rng.randrange(300, 4000) for _ in range(PROMPT_TOKENS)]
    time.sleep(SETTLE_S)
    before = counted(served.engines[:1], REQUEST)
    began, stamps = token_times(served, prompt, SINGLE_TOKENS)
    if stack.name == OURS:
        (note,) = served.client.get("/admin/requests?limit=1").json()["requests"]
        prompt_s: float = note["queue_s"] + note["prefill_s"]
    else:
        spent = since(before, counted(served.engines[:1], REQUEST))[REQUEST]
        assert spent["_count"] == 1, f"one request, {spent['_count']:g} counted"
        prompt_s = spent["_sum"]
    gaps = [after - before for before, after in itertools.pairwise(stamps[1:])]
    return stamps[1] - began - prompt_s - NUM_STEPS[stack.name] * statistics.median(gaps)


def second_token_s(record: RequestRecord) -> float:
    """Return when the second token was there: the first moment at which both stacks have handed
    the prompt over. The peer's first token is decode's own, ours is prefill's."""
    index = next(index for index, count in enumerate(record.token_counts) if count >= 2)
    return record.token_s[index] - record.scheduled_s


def figures(files: Sequence[File], handoffs: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Compare the files of a run, all rounds put together."""
    records = {name: _completed(files, name) for name in (OURS, PEER)}

    def compared(name: str, value: Callable[[RequestRecord], float | None]) -> Figure:
        pairs = (_spread([value(record) for record in records[stack]]) for stack in (OURS, PEER))
        return Figure(name, *pairs)

    return [
        compared("TTFT", lambda record: record.ttft_s),
        compared("time to the second token", second_token_s),
        compared("TPOT", lambda record: record.tpot_s),
        Figure("hand-off", *(_spread(handoffs[stack]) for stack in (OURS, PEER))),
    ]


def _completed(files: Sequence[File], stack: str) -> list[RequestRecord]:
    requests = [r for file in files if file["stack"] == stack for r in file["run"]["requests"]]
    return [record for record in map(record_of, requests) if record.is_completed]


def _spread(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return percentile(known, 50), percentile(known, 99)


def report(folder: Path, is_dry: bool) -> bool:
    """Print or write what the files of a run come to; return whether ours is better throughout."""
    about = json.loads((folder / "about.json").read_text())
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("256*.json"))]
    if about["missing"]:
        print("Not measured:", about["missing"])
        return False
    alone = [json.loads(path.read_text()) for path in sorted(folder.glob("alone-*.json"))]
    handoffs = {
        name: [value for each in alone if each["stack"] == name for value in each["handoffs_s"]]
        for name in (OURS, PEER)
    }
    found = figures(files, handoffs)
    counts = {name: len(_completed(files, name)) for name in (OURS, PEER)}
    sent = sum(len(file["run"]["requests"]) for file in files if file["stack"] == OURS)
    is_better = all(figure.is_better for figure in found) and set(counts.values()) == {sent}
    header = ["ms", f"{TITLES[OURS]} p50", "p99", f"{TITLES[PEER]} p50", "p99", "ours"]
    body = (
        table(header, [figure.row() for figure in found])
        + f"\n\n{'Better' if is_better else 'NOT better'} on each at p50 and p99; completed"
        f" {counts[OURS]} and {counts[PEER]} of {sent}.\n\n{_setting(about, files)}\n\n"
        + _explained(files, len(handoffs[OURS]))
    )
    if is_dry:
        print(body)
    else:
        write_section("peer", "make bench-peer", body)
    return is_better


def _setting(about: File, files: Sequence[File]) -> str:
    plan, (rate,) = about["plan"], {file["rate"] for file in files}
    load = ", ".join(f"{each:.1f}" for each in about["load"])
    return (
        f"{PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens, Poisson at {rate:g} requests/s,"
        f" {plan['rounds']} slices of {plan['seconds']:g} s for each stack in turn, alone on the"
        " machine, the same prompts at the same moments. Engines as in `make bench-goodput`, chunk"
        f" {plan['chunk_tokens']}, {engine_settings.DTYPE}, one core each; {about['versions']}."
        f" Load average before and after each slice: {load}."
    )


def _explained(files: Sequence[File], num_single: int) -> str:
    times = [file["transfers"] for file in files if file["stack"] == PEER]
    moved, posted = added(times, TRANSFER), mean_s(added(times, POST))
    quantiles = " and ".join(f"{1e3 * quantile_s(moved, share):.1f}" for share in (0.5, 0.99))
    pulls = _spread([note["pull_s"] for file in files for note in file["notes"]])
    return (
        "The time to the second token contains the whole hand-off of either: our first token comes"
        " from prefill, before it, theirs from decode, after it. The hand-off is what the second"
        " token waits for beside prompt and decode steps: front-end, routing, transfer and every"
        f" message. It is of {num_single} requests, one at a time, after the slices: the time to"
        " the second token, less the prompt (ours: queue and prefill in the record of"
        " `/admin/requests`; theirs: `vllm:e2e_request_latency_seconds` of the prefill engine),"
        " less the median time between later tokens, once for us and twice for them, whose decode"
        " engine samples the first token too. What each stack counts itself is not the same thing"
        " twice: ours (`pull_s`), from the prompt computed to its last block in place, without"
        f" that one's way over the wire, {1e3 * pulls[0]:.2f} ms at p50 and {1e3 * pulls[1]:.2f} at"
        " p99; vLLM's (`nixl_xfer_time_seconds`), from a transfer's post to its completion, within"
        f" buckets, {quantiles} ms, and on average {1e3 * posted:.1f} ms to post it."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=RATE, help="requests/s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of arrivals per slice")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="slices of each stack")
    parser.add_argument("--chunk", type=int, default=engine_settings.CHUNK_TOKENS)
    parser.add_argument("--out", type=Path, help="folder for per-request data [a temporary one]")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only report on that folder")
    parser.add_argument("--dry", action="store_true", help="print only")
    flags = parser.parse_args()
    if flags.report is not None:
        return 0 if report(flags.report, flags.dry) else 1
    # So that a stopped run, too, ends what it has started.
    signal.signal(signal.SIGTERM, end)
    shape = Workload(PROMPT_TOKENS, OUTPUT_TOKENS, (flags.rate,), (), ())
    plan = Plan({str(PROMPT_TOKENS): shape}, flags.seconds, flags.rounds, flags.chunk)
    out = flags.out or Path(tempfile.mkdtemp(prefix="tandem-peer-"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tandem-peers-") as folder:
        run(plan, (OURS, PEER), Path(folder), out, measure_both)
    print(f"per-request data: {out}")
    return 0 if report(out, flags.dry) else 1


if __name__ == "__main__":
    raise SystemExit(main())
