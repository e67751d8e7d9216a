"""The judge of the large loop: it must not call a fleet good that is not."""

from autoscaler.decision_log import Record
from autoscaler.policy import decide
from autoscaler.ratio import Sizes
from autoscaler.signals import PoolCounts
from tests.day_verdict import Verdict, judge
from tests.unit.autoscaler.samples import START, section, snapshot, state


def record(number: int, prefill: PoolCounts, decode: PoolCounts, tps: float = 400.0) -> Record:
    """Return a decision of a fleet that is to have 4P4D and carries 400 tokens/s."""
    seen, before = snapshot(prefill=prefill, decode=decode, decode_tps=tps), state(4, 4)
    now = START + 1000.0 * number
    decision, _ = decide(section(), before, seen, now)
    assert decision.final == Sizes(4, 4)
    return Record(number, now, seen, before, decision)


def pools(*sizes: tuple[PoolCounts, PoolCounts]) -> Verdict:
    return judge([record(number, *pair) for number, pair in enumerate(sizes)], section())


def serving(count: int, held: int = 0) -> PoolCounts:
    return PoolCounts(serving=count, held=held)


def test_one_worker_more_is_out_of_ratio_where_it_is_more_than_the_tolerance() -> None:
    verdict = pools((serving(5), serving(4)), (serving(6), serving(5)), (serving(5), serving(6)))
    assert [r.seq for r in verdict.waiting] == [0] and verdict.off_ratio == ()


def test_it_is_forgiven_only_while_no_ready_worker_could_mend_it() -> None:
    both = (serving(4), serving(4))
    lost = pools(both, (serving(4), serving(2)))
    assert [r.seq for r in lost.waiting] == [1] and lost.off_ratio == ()
    held_back = pools(both, (serving(4), serving(2, held=1)))
    assert [r.seq for r in held_back.off_ratio] == [1]
    let_through = pools((serving(2), serving(2)), (serving(4), serving(2)))
    assert [r.seq for r in let_through.off_ratio] == [1]


def test_decode_workers_are_counted_against_the_published_law() -> None:
    both = (serving(4), serving(4))
    loads = (400.0, 340.0, 440.0)
    right = judge([record(n, *both, tps) for n, tps in enumerate(loads)], section())
    assert (right.num_ticks, right.share_within, right.num_actions) == (3, 1.0, 0)
    twice = section(target_per_worker=50.0)
    wrong = judge([record(n, *both, tps) for n, tps in enumerate(loads)], twice)
    assert (wrong.num_ticks, wrong.num_within) == (3, 0)
