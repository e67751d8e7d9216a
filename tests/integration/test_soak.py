"""A few hundred hand-offs of the 20,000 that `make bench-soak` makes, with both roles killed."""

from tests.soak import SoakPlan, soak
from tests.soak_verdict import courses

# What a process takes for good when it does something for the first time is in it, too.
MEMORY_TOLERANCE_BYTES = 8 << 20


async def test_hand_offs_leave_nothing_behind() -> None:
    run = await soak(SoakPlan(handoffs_per_sample=150, num_samples=2, num_kills=2))
    assert run.tally.handoffs >= 300 and run.tally.kills.total() == 2
    assert run.tally.wrong == []
    # Only what was being decoded on a worker that was killed is lost.
    assert run.tally.errors.total() <= 16, run.tally.errors
    assert set(run.tally.transports) == {"shm", "tcp"} and run.tally.outcomes["cancelled"] > 0
    assert [
        course for course in courses(run.samples, MEMORY_TOLERANCE_BYTES) if not course.is_flat
    ] == []
