"""What `make bench-goodput` says: tables and a picture, from the files of a run alone."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.loadtest.measures import percentile
from deploy.loadtest.words import Slo
from tests.benchmarks.engine_settings import DTYPE, KV_CACHE_GIB, MAX_MODEL_LEN, MAX_NUM_SEQS
from tests.benchmarks.goodput_plot import draw
from tests.benchmarks.objectives import SHARE, Cell, Goodput, cells_of, goodput, score, worst_gap_s
from tests.benchmarks.sections import PAGE, table, write_section
from tests.benchmarks.stacks import TITLES

IMAGE = PAGE.parent / "images" / "goodput.svg"
OURS = "tandem"


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, rates in requests/s, and the objectives asked for, in seconds."""

    prompt_tokens: int
    output_tokens: int
    rates: tuple[float, ...]
    ttfts_s: tuple[float, ...]
    tpots_s: tuple[float, ...]


_TPOTS_S = (0.035, 0.04, 0.05, 0.07, 0.1, 0.2)
# One core prefills 256 tokens in 0.6 s (64 in 0.16 s) and decodes a token in 28 ms, 16 at once in
# 60 ms. Prompts saturate one prefill core at 1.6 requests/s, two colocated engines at about 2;
# answers of 96 tokens saturate one decode core at about 3, two engines at about 4.
WORKLOADS = {
    "prompt-heavy": Workload(
        256,
        32,
        (0.5, 0.8, 1.1, 1.5, 2.0),
        (0.75, 1.0, 1.5, 2.5, 5.0),
        _TPOTS_S,
    ),
    "chat": Workload(
        64,
        96,
        (0.6, 1.2, 2.0, 3.0, 4.0),
        (0.25, 0.4, 0.6, 1.0, 2.0),
        _TPOTS_S,
    ),
}


def report(folder: Path, is_dry: bool) -> None:
    """Print the report of the run in `folder`; unless `is_dry`, write page and picture too."""
    about = json.loads((folder / "about.json").read_text())
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("[!ar]*.json"))]
    cells = cells_of((f["stack"], f["workload"], f["rate"], f["run"]) for f in files)
    titles = {name: title for name, title in TITLES.items() if any(c.stack == name for c in cells)}
    names = [name for name in WORKLOADS if any(cell.workload == name for cell in cells)]
    image = folder / IMAGE.name if is_dry else IMAGE
    grids = {name: (WORKLOADS[name].ttfts_s, WORKLOADS[name].tpots_s) for name in names}
    draw(cells, titles, grids, image)
    late_s = max(f["run"]["scheduling"]["p99_s"] for f in files)
    parts = [_setting(about, late_s)]
    parts += [f"Not measured: {title}: {why}" for title, why in about["missing"].items()]
    parts.append(f"![Goodput against objectives](images/{IMAGE.name})")
    for name in names:
        here = [cell for cell in cells if cell.workload == name]
        parts += [_objectives(name, here, titles), _latencies(here, titles)]
    if any(file["notes"] for file in files):
        parts.append(_stages(files))
    body = "\n\n".join(parts)
    if is_dry:
        print(body)
    else:
        write_section("goodput", "make bench-goodput", body)


def _setting(about: dict[str, Any], late_s: float) -> str:
    plan = about["plan"]
    shapes = "; ".join(
        f"{name}: {each['prompt_tokens']} prompt and {each['output_tokens']} output tokens, Poisson"
        f" at {', '.join(f'{rate:g}' for rate in each['rates'])} requests/s"
        for name, each in plan["workloads"].items()
    )
    load = ", ".join(f"{each:.1f}" for each in about["load"])
    return (
        f"{shapes}. {plan['seconds']:g} s of arrivals per rate, {plan['rounds']} round(s), one"
        " stack at a time, every stack the same prompts at the same moments; no prompt shares a"
        " prefix with another; a request that takes 40 s is lost."
        f"\n\nEach stack: two engines of the bench model, the computing process of each on a core"
        f" of its own; {DTYPE}, chunk {plan['chunk_tokens']}, at most {MAX_NUM_SEQS} sequences,"
        f" {KV_CACHE_GIB} GiB of KV cache, context {MAX_MODEL_LEN}, eager, prefix caching on."
        " Everything else floats over both cores in every stack: routers, proxies, API servers,"
        " engines' scheduler processes, and the client (`tandem loadtest`'s). vLLM's NixlConnector"
        " moves the computing thread of both its engines to the machine's last core; here it is"
        " put back, or they would share that core."
        f" Peers: {about['versions']}; `vllm-router` with its P/D mode (prefill's answer, then"
        " decode) or round robin. Ours: every other setting at its default (prompts of more than"
        " one token are prefilled remotely, 8 prompts at once per prefill worker, transfer by"
        f" shared memory). The client sent at most {1e3 * late_s:.1f} ms late at p99 in any cell."
        f" Load average before and after each stack: {load}."
    )


def _objectives(name: str, cells: Sequence[Cell], titles: dict[str, str]) -> str:
    """Return the goodput of each stack for each pair of objectives."""
    shape = WORKLOADS[name]
    rows, everything = [], []
    for ttft_s in shape.ttfts_s:
        row = [f"{ttft_s:g} s"]
        for tpot_s in shape.tpots_s:
            found = {
                stack: goodput([c for c in cells if c.stack == stack], Slo(ttft_s, tpot_s))
                for stack in titles
            }
            everything.append(found)
            row.append(" / ".join(_marked(found, stack) for stack in titles))
        rows.append(row)
    head = ["TTFT \\ TPOT", *(f"{1e3 * tpot_s:g} ms" for tpot_s in shape.tpots_s)]
    said = ""
    if OURS in titles and len(titles) > 1:
        counts = score(everything, OURS)
        said = (
            f" {titles[OURS]} is ahead of the better of the others in {counts.ahead} of"
            f" {counts.ahead + counts.level + counts.behind} pairs that anybody meets, level in"
            f" {counts.level}, behind in {counts.behind}."
        )
    return (
        f"**{name}**: goodput in requests/s, {' / '.join(titles.values())}: the highest rate at"
        f" which {SHARE:.0%} of requests meet both objectives, between rates by interpolation; ≥"
        f" where that is the highest rate tried.{said}\n\n{table(head, rows)}"
    )


def _marked(found: dict[str, Goodput], stack: str) -> str:
    best = max(each.rate for each in found.values())
    return f"**{found[stack]}**" if best and found[stack].rate == best else str(found[stack])


def _latencies(cells: Sequence[Cell], titles: dict[str, str]) -> str:
    rows = []
    for cell in sorted(cells, key=lambda each: (each.rate, list(TITLES).index(each.stack))):
        done = cell.completed
        columns = (
            [each.ttft_s for each in done],
            [each.tpot_s for each in done],
            [worst_gap_s(each) for each in done],
        )
        rows.append(
            [
                f"{cell.rate:g}",
                titles[cell.stack],
                f"{len(done)} of {len(cell.records)}",
                *(_spread([v for v in column if v is not None]) for column in columns),
            ]
        )
    head = ["requests/s", "stack", "completed", "TTFT ms", "TPOT ms", "worst gap ms"]
    return f"p50 / p90 over requests:\n\n{table(head, rows)}"


def _stages(files: Sequence[dict[str, Any]]) -> str:
    """Return where ours spent the time to first tokens, by its own records."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for file in sorted(files, key=lambda each: list(WORKLOADS).index(each["workload"])):
        if file["notes"]:
            notes = [note for note in file["notes"] if note["ttft_s"] is not None]
            found.setdefault((file["workload"], file["rate"]), []).extend(notes)
    rows = []
    for (workload, rate), notes in found.items():
        columns = ("queue_s", "prefill_s", "transfer_s", "pull_s")
        spreads = (_spread([n[key] for n in notes if n[key] is not None]) for key in columns)
        rows.append([workload, f"{rate:g}", *spreads])
    head = [
        "workload",
        "requests/s",
        "queue ms",
        "prefill ms",
        "hand-off and first step ms",
        "of it pull",
    ]
    return (
        f"Where {TITLES[OURS]} spends its TTFT, from its own records, p50 / p90; prefill contains"
        f" the wait for the prefill engine:\n\n{table(head, rows)}"
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{1e3 * statistics.median(values):.0f} / {1e3 * percentile(values, 90):.0f}"
