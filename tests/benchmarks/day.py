"""`make bench-day`: a day of load in minutes on 24 simulated workers and four Ray nodes.

What runs and how it is judged is in `tests/day.py`; the suite runs a cut of the same day.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from autoscaler.decision_log import Record
from tests.benchmarks.sections import table, write_section
from tests.day import MEMORY_LIMIT_BYTES, NODES, WITHIN_LIMIT, Cut, Run, follow

NAME = "bench-day"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=24.0, help="how much of the day")
    cut = Cut(hours=parser.parse_args().hours)
    with tempfile.TemporaryDirectory(prefix="bench-day-") as folder:
        return 0 if report(follow(cut, NAME, Path(folder)), cut) else 1


def _listed(records: Sequence[Record]) -> str:
    numbers = ", ".join(
        f"#{r.seq} ({r.snapshot.prefill.serving}:{r.snapshot.decode.serving})" for r in records[:40]
    )
    return f"{len(records)}: {numbers}" if records else "0"


def report(run: Run, cut: Cut) -> bool:
    """Print and write the table; return whether the limits hold."""
    load, records, verdict, largest = run.load, run.records, run.verdict, run.largest_bytes
    sizes = [record.decision.final for record in records]
    least, most = (pick(s.decode for s in sizes) for pick in (min, max))
    rows: list[list[object]] = [
        ["requests sent, failed", f"{load.num_sent}, {len(load.failures)}"],
        ["decisions, steps", f"{len(records)}, {verdict.num_actions}"],
        ["decode workers, least to most", f"{least} to {most}"],
        [
            "D within 1 of ceil(M/m*) after a cooldown",
            f"{100 * verdict.share_within:.1f} % of {verdict.num_ticks} decisions",
        ],
        ["decisions with P:D out of tolerance", len(verdict.off_ratio)],
        ["the same, because workers were not ready yet", _listed(verdict.waiting)],
        ["largest worker, RSS", f"{largest / 2**20:.0f} MiB"],
    ]
    is_within = (
        not load.failures
        and verdict.share_within >= WITHIN_LIMIT
        and not verdict.off_ratio
        and largest <= MEMORY_LIMIT_BYTES
    )
    body = table(["a day in minutes", ""], rows)
    for failure in load.failures[:5]:
        print(failure)
    for record in verdict.off_ratio[:20]:
        print("off ratio:", record.seq, record.snapshot.prefill, record.snapshot.decode)
    body += f"\n\nLimits (no failure, 90 %, ratio, 150 MiB): {'held' if is_within else 'NOT held'}."
    body += f" Simulated engines, {NODES} Ray nodes, everything {cut.speedup:g} times as fast."
    write_section("day", "make bench-day", body)
    return is_within


if __name__ == "__main__":
    raise SystemExit(main())
