"""Both state machines: any state x any event moves legally, or raises and changes nothing."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff import (
    PRODUCER_TABLE,
    ConsumerHandoff,
    ConsumerState,
    IllegalEvent,
    ProducerEvent,
    ProducerHandoff,
    ProducerState,
)
from kv_transfer.layout import Read

P, E = ProducerState, ProducerEvent
OVER = (P.RELEASED, P.EXPIRED, P.ABORTED)
ENDS = {E.RELEASED: P.RELEASED, E.EXPIRED: P.EXPIRED, E.ABORTED: P.ABORTED}


def walk(*events: ProducerEvent, state: ProducerState = P.HELD) -> ProducerHandoff:
    handoff = ProducerHandoff(state)
    for event in events:
        handoff = handoff.advance(event)
    return handoff


@pytest.mark.parametrize(
    ("label", "events", "state", "num_sends"),
    [
        ("untouched", (), P.HELD, 0),
        ("reading", (E.READ_STARTED,), P.SENDING, 1),
        ("two reads", (E.READ_STARTED, E.READ_STARTED), P.SENDING, 2),
        ("one of two is over", (E.READ_STARTED, E.READ_STARTED, E.READ_ENDED), P.SENDING, 1),
        ("held again", (E.READ_STARTED, E.READ_ENDED), P.HELD, 0),
        ("released", (E.RELEASED,), P.RELEASED, 0),
        ("expired", (E.EXPIRED,), P.EXPIRED, 0),
        ("aborted", (E.ABORTED,), P.ABORTED, 0),
        ("released while sending", (E.READ_STARTED, E.RELEASED), P.ENDING, 1),
        (
            "expired, one send left",
            (E.READ_STARTED, E.READ_STARTED, E.EXPIRED, E.READ_ENDED),
            P.ENDING,
            1,
        ),
        ("released, sent", (E.READ_STARTED, E.RELEASED, E.READ_ENDED), P.RELEASED, 0),
        ("aborted, sent", (E.READ_STARTED, E.ABORTED, E.READ_ENDED), P.ABORTED, 0),
    ],
)
def test_producer_paths(
    label: str, events: tuple[ProducerEvent, ...], state: ProducerState, num_sends: int
) -> None:
    handoff = walk(*events)
    assert (handoff.state, handoff.num_sends) == (state, num_sends), label


@pytest.mark.parametrize(
    ("label", "events", "state", "num_sends"),
    [
        ("nothing finished", (), P.FILLING, 0),
        ("read while computed", (E.READ_STARTED,), P.FEEDING, 1),
        ("read, more to come", (E.READ_STARTED, E.READ_ENDED), P.FILLING, 0),
        ("complete", (E.COMPLETED,), P.HELD, 0),
        ("complete in mid-read", (E.READ_STARTED, E.COMPLETED), P.SENDING, 1),
        ("and read", (E.READ_STARTED, E.COMPLETED, E.READ_ENDED), P.HELD, 0),
        ("revoked in mid-read", (E.READ_STARTED, E.REVOKED), P.FEEDING, 1),
        ("aborted", (E.ABORTED,), P.ABORTED, 0),
        ("aborted in mid-read", (E.READ_STARTED, E.ABORTED), P.ENDING, 1),
        ("and read out", (E.READ_STARTED, E.ABORTED, E.READ_ENDED), P.ABORTED, 0),
        ("the whole way", (E.COMPLETED, E.READ_STARTED, E.READ_ENDED, E.RELEASED), P.RELEASED, 0),
    ],
)
def test_open_paths(
    label: str, events: tuple[ProducerEvent, ...], state: ProducerState, num_sends: int
) -> None:
    handoff = walk(*events, state=P.FILLING)
    assert (handoff.state, handoff.num_sends) == (state, num_sends), label


@pytest.mark.parametrize("state", [P.FILLING, P.FEEDING])
@pytest.mark.parametrize("event", [E.RELEASED, E.EXPIRED])
def test_only_the_engine_ends_what_it_computes(state: ProducerState, event: ProducerEvent) -> None:
    with pytest.raises(IllegalEvent):
        ProducerHandoff(state).advance(event)


@pytest.mark.parametrize("state", OVER)
@pytest.mark.parametrize("event", ProducerEvent)
def test_nothing_happens_after_the_end(state: ProducerState, event: ProducerEvent) -> None:
    with pytest.raises(IllegalEvent, match=state.value):
        ProducerHandoff(state=state).advance(event)


@given(st.sampled_from([P.HELD, P.FILLING]), st.lists(st.sampled_from(ProducerEvent), max_size=30))
def test_producer_never_frees_early_or_twice(
    start: ProducerState, events: list[ProducerEvent]
) -> None:
    handoff, num_sends, num_frees = ProducerHandoff(start), 0, 0
    is_complete, revision = start is P.HELD, 0
    for event in events:
        before = handoff
        try:
            handoff = handoff.advance(event)
        except IllegalEvent:
            assert (before.state, event) not in PRODUCER_TABLE
            assert handoff == before
            continue
        num_sends += {E.READ_STARTED: 1, E.READ_ENDED: -1}.get(event, 0)
        if event in (E.REVOKED, E.COMPLETED):
            assert not is_complete, "what is complete is taken back or completed"
            is_complete = event is E.COMPLETED
            revision += event is E.REVOKED
        if event in (E.RELEASED, E.EXPIRED):
            assert is_complete, "ended by others than the engine while it computes"
        assert handoff.revision == revision
        assert handoff.is_filling == (not is_complete and handoff.end is None)
        assert handoff.num_sends == num_sends >= 0
        assert handoff.is_readable == (handoff.end is None)
        if event is E.READ_STARTED:
            assert before.is_readable, "a read of what has ended"
        if handoff.is_over:
            num_frees += 1
            assert num_sends == 0, "freed while a send is in flight"
            assert handoff.state is handoff.end
        if event in ENDS:
            assert handoff.end is ENDS[event], "the first end decides"
    assert num_frees <= 1


READS = st.lists(
    st.builds(Read, st.integers(0, 2), st.integers(0, 50), st.integers(1, 4)),
    unique=True,
    max_size=12,
)


@dataclass
class Ledger:
    """What a consumer hand-off asked for and reported, as its shell would see it."""

    handoff: ConsumerHandoff
    asked: list[Read] = field(default_factory=list)
    received: set[Read] = field(default_factory=set)
    reports: list[ConsumerState] = field(default_factory=list)

    def apply(self, step: str, read: Read) -> None:
        before = self.handoff
        try:
            reads = self._move(step, read)
        except IllegalEvent:
            assert self.handoff == before
            return
        self.asked += reads
        assert not before.is_over, "moved after its report"
        if self.handoff.is_over:
            self.reports.append(self.handoff.state)

    def _move(self, step: str, read: Read) -> tuple[Read, ...]:
        if step == "start":
            self.handoff, reads = self.handoff.start()
        elif step == "receive":
            self.handoff, reads = self.handoff.receive(read)
            assert read in self.asked and read not in self.received
            self.received.add(read)
        else:
            self.handoff, reads = self.handoff.fail("lost"), ()
        return reads


@given(
    reads=READS,
    window=st.integers(1, 4),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["start", "receive", "receive", "receive", "receive", "fail"]),
            st.integers(0, 13),
        ),
        max_size=40,
    ),
)
def test_consumer_asks_once_and_reports_once(
    reads: list[Read], window: int, steps: list[tuple[str, int]]
) -> None:
    ledger = Ledger(ConsumerHandoff(tuple(reads), window))
    for step, index in steps:
        asked = sorted(ledger.handoff.asked, key=repr)
        # Mostly what was asked for; else anything, a foreign read included.
        candidates = asked if asked and index < 10 else [*reads, Read(9, 9, 9)]
        ledger.apply(step, candidates[index % len(candidates)])
        assert len(ledger.handoff.asked) <= window
        assert ledger.asked == reads[: len(ledger.asked)], "each read once, in order"
    assert len(ledger.reports) <= 1
    if ledger.handoff.state is ConsumerState.LOADED:
        assert ledger.received == set(reads)


@given(reads=READS, window=st.integers(1, 4), rng=st.randoms(use_true_random=False))
def test_consumer_that_gets_all_its_reads_is_loaded(
    reads: list[Read], window: int, rng: random.Random
) -> None:
    ledger = Ledger(ConsumerHandoff(tuple(reads), window))
    ledger.apply("start", Read(0, 0, 0))
    while ledger.handoff.asked:
        assert len(ledger.handoff.asked) <= window
        ledger.apply("receive", rng.choice(sorted(ledger.handoff.asked, key=repr)))
    assert ledger.asked == reads
    assert ledger.reports == [ConsumerState.LOADED]


def test_failure_says_why_and_forgets_its_reads() -> None:
    handoff, reads = ConsumerHandoff((Read(0, 0, 1), Read(0, 1, 1)), window=1).start()
    assert reads == (Read(0, 0, 1),)
    failed = handoff.fail("stalled")
    assert (failed.failure, failed.waiting, failed.asked) == ("stalled", (), frozenset())
    with pytest.raises(IllegalEvent):
        failed.fail("again")
    with pytest.raises(IllegalEvent):
        failed.receive(Read(0, 0, 1))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 4)), max_size=12),
    st.integers(1, 9),
)
def test_merged_reads_are_of_the_same_blocks(
    rows: list[tuple[int, int, int]], most_blocks: int
) -> None:
    reads = tuple(Read(*row) for row in rows)
    merged = ConsumerHandoff(reads, 2).merge(most_blocks).waiting

    def blocks(some: tuple[Read, ...]) -> list[tuple[int, int]]:
        ends = [(read, read.first_block + read.num_blocks) for read in some]
        return [(read.group, at) for read, end in ends for at in range(read.first_block, end)]

    assert sorted(blocks(merged)) == sorted(blocks(reads))
    longest = max((read.num_blocks for read in reads), default=0)
    assert all(read.num_blocks <= max(most_blocks, longest) for read in merged)
    whole = tuple(Read(0, at, 2) for at in range(0, 8, 2))
    assert ConsumerHandoff(whole, 2).merge(100).waiting == (Read(0, 0, 8),)
