"""The large loop, a cut of the day that `make bench-day` runs whole: up to its first peak and down
again, on up to 24 simulated workers."""

import os
from pathlib import Path

import pytest

from tests.day import MEMORY_LIMIT_BYTES, WITHIN_LIMIT, Cut, follow

pytestmark = [pytest.mark.alone, pytest.mark.timeout(400)]

CUT = Cut(begin_h=0.5, hours=4.0, speedup=240.0)


def test_both_pools_follow_the_published_curve(tmp_path: Path) -> None:
    run = follow(CUT, f"t-day-{os.getpid()}", tmp_path)
    verdict, decode = run.verdict, [record.decision.final.decode for record in run.records]
    waiting = [(r.snapshot.prefill.serving, r.snapshot.decode.serving) for r in verdict.waiting]
    print(f"out of ratio while nobody was ready to mend it: {waiting}")
    assert run.load.failures == []
    assert verdict.num_ticks > 20 and verdict.share_within >= WITHIN_LIMIT
    assert verdict.off_ratio == ()
    assert run.largest_bytes <= MEMORY_LIMIT_BYTES
    # Not at the end: what a slow machine has not answered by then comes in one heap.
    peak = decode.index(max(decode))
    assert decode[peak] >= 10 and min(decode[peak:]) <= decode[peak] - 2, "up, and down again"
