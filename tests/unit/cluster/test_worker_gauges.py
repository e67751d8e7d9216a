"""What a worker can tell of its engine: durations by stage, and blocks that have leaked."""

from collections import Counter

from cluster.config import HandoffSection
from cluster.engine import EngineLoad, top_holders
from cluster.leaks import LeakWatch
from cluster.messages import Holder
from cluster.metrics import REGISTRIES
from cluster.names import Component, HandoffId
from cluster.stages import BUCKETS_S, StageClock, TimeCounts, times_in, without_times
from cluster.worker_metrics import WorkerMetrics


def test_durations_travel_among_the_totals() -> None:
    counts: Counter[str] = Counter(pulls_loaded=2)
    gather, verify = StageClock(counts, "gather"), StageClock(counts, "verify")
    for seconds in (0.00005, 0.0001, 0.0002, 99.0):
        gather.add(seconds)
    verify.add(1.0)
    assert without_times(counts) == {"pulls_loaded": 2}
    times = times_in(counts)
    assert times["gather"] == TimeCounts((2, 1, *[0] * (len(BUCKETS_S) - 2), 1), 99.00035)
    assert times["verify"].buckets[BUCKETS_S.index(1)] == 1
    assert times_in({"time_travel": 1, "pulls_failed": 3}) == {}


def test_durations_of_two_ranks_add_up() -> None:
    one: Counter[str] = Counter()
    StageClock(one, "pull").add(0.3)
    assert times_in(one + one) == {
        "pull": TimeCounts(tuple(2 * n for n in times_in(one)["pull"].buckets), 0.6)
    }


def test_blocks_taken_at_rest_have_leaked() -> None:
    watch = LeakWatch(settle_s=5)
    assert [watch.observe(3, True, now) for now in (0.0, 4.9, 5.0, 60.0)] == [0, 0, 3, 3]


def test_blocks_that_are_given_back_late_have_not() -> None:
    watch = LeakWatch(settle_s=5)
    assert watch.observe(8, False, 0.0) == 0
    assert [watch.observe(n, True, now) for n, now in ((8, 1.0), (2, 5.9), (0, 9.0))] == [0, 0, 0]
    assert [watch.observe(0, True, now) for now in (20.0, 40.0)] == [0, 0]


def test_load_starts_the_wait_anew_and_hides_no_leak() -> None:
    watch = LeakWatch(settle_s=5)
    watch.observe(3, True, 0.0)
    assert watch.observe(90, False, 4.0) == 0
    assert [watch.observe(3, True, now) for now in (5.0, 9.0, 10.0)] == [0, 0, 3]
    assert watch.observe(90, False, 11.0) == 3
    # No more can have leaked than is taken.
    assert watch.observe(1, False, 12.0) == 1


def test_pinned_blocks_are_added_up_over_time() -> None:
    def total() -> float:
        name = "tandem_pinned_block_seconds_total"
        return REGISTRIES[Component.WORKER].get_sample_value(name) or 0.0

    shown, before = WorkerMetrics(HandoffSection()), total()
    for num_held, now in ((4, 100.0), (4, 100.5), (1, 102.0), (0, 105.0), (0, 200.0)):
        shown.show(EngineLoad(0, 0, 65, 64 - num_held, num_held, 1, {}), 0, now, {})
    assert total() - before == 4 * 2.0 + 1 * 3.0


def test_the_dearest_holders_are_named_first() -> None:
    held = [Holder(HandoffId(f"h{n}"), n, 60.0 / (1 + n % 3)) for n in range(1, 12)]
    named = [holder.handoff_id for holder in top_holders(held)]
    assert named == ["h9", "h6", "h10", "h11", "h7"]
