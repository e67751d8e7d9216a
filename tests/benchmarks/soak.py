"""`make bench-soak`: what processes have left after 20,000 hand-offs.

What runs is in `tests/soak.py`, how it is judged in `tests/soak_verdict.py`; the suite runs a
few hundred of the same hand-offs.
"""

import argparse
import asyncio
import logging
import os
from collections.abc import Mapping

from tests.benchmarks.sections import table, write_section
from tests.soak import NUM_CLIENTS, SoakPlan, SoakRun, soak
from tests.soak_verdict import FILES_TOLERANCE, Course, courses

NUM_HANDOFFS, NUM_SAMPLES = 20_000, 25
MEMORY_TOLERANCE_BYTES = 4 << 20
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handoffs", type=int, default=NUM_HANDOFFS)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="intervals, equally long")
    parser.add_argument("--dry", action="store_true", help="print only")
    flags = parser.parse_args()
    # Every killed worker's requests say that they are tried again.
    logging.disable(logging.WARNING)
    load_before = os.getloadavg()[0]
    plan = SoakPlan(-(-flags.handoffs // flags.samples), flags.samples)
    run = asyncio.run(soak(plan))
    body, is_flat = report(run, load_before)
    if flags.dry:
        print(body)
    else:
        write_section("soak", "make bench-soak", body)
    return 0 if is_flat else 1


def report(run: SoakRun, load_before: float) -> tuple[str, bool]:
    """Return the section, and whether nothing grew and no answer was wrong."""
    found, tally = courses(run.samples, MEMORY_TOLERANCE_BYTES), run.tally
    is_flat = all(course.is_flat for course in found) and not tally.wrong
    rows = [
        [course.name, _shown(course.first), _shown(course.last), _verdict(course)]
        for course in found
    ]
    body = (
        table(["", "first third", "last third", ""], rows)
        + f"\n\n{'Flat' if is_flat else 'NOT flat'}: {tally.handoffs:,} hand-offs whose KV cache"
        f" arrived ({_counted(tally.transports)}) in {run.seconds:.0f} s, {NUM_CLIENTS} clients at"
        f" a time, CURVE keys on. Requests by outcome: {_counted(tally.outcomes)}. Killed with"
        f" SIGKILL and replaced: {_counted(tally.kills)}; setbacks that requests met with:"
        f" {_counted(tally.setbacks)}; answers with a wrong token: {len(tally.wrong)}. Medians of"
        f" the first and the last third of {len(run.samples)} moments without requests,"
        f" {run.plan.handoffs_per_sample} hand-offs apart, at each of which every block of every"
        " engine was free within 5 s. Blocks, segments, names and arenas may not be more at"
        f" the end, a process's open files {FILES_TOLERANCE} more, its memory"
        f" {MEMORY_TOLERANCE_BYTES / MIB:.0f} MiB. Simulated engines, the"
        " router's flow and the sockets are real; prefill-0, decode-0 (shared memory) and decode-1"
        f" (TCP) live through the run. Load average before {load_before:.1f}, after"
        f" {os.getloadavg()[0]:.1f}."
    )
    return body, is_flat


def _shown(value: float) -> str:
    return f"{value / MIB:.1f} MiB" if value >= MIB else f"{value:g}"


def _verdict(course: Course) -> str:
    return "flat" if course.is_flat else "GROWS"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items())) or "none"


if __name__ == "__main__":
    raise SystemExit(main())
