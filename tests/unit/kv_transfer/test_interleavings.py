"""Random orders of everything that can happen to three hand-offs over a wire that loses,
repeats and reorders: every pull ends once, every hold is freed once, no wrong byte is loaded,
over frames and over an arena with too few slots. Some are pulled while their engine computes
them, takes their blocks back and computes them once more elsewhere."""

from collections import Counter, deque
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.names import HandoffId
from kv_transfer.handoff import ProducerEvent
from kv_transfer.producer import UNKNOWN_GRACE_S, Hold
from kv_transfer.progress import Growth
from tests.unit.kv_transfer.pair import LEASE_S, STALL_S, Pair

NUM = 3
BLOCKS = {index: tuple(range(1 + 5 * index, 6 + 5 * index)) for index in range(NUM)}
# Where a prompt that lost its blocks is computed again.
ELSEWHERE = {index: tuple(range(31 + 5 * index, 36 + 5 * index)) for index in range(NUM)}
REUSED, TOKEN = 0xEE, 77

Item = TypeVar("Item")

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["hold", "pull", "announce", "give up", "cancel", "abort", "abort in gather"]
            + ["open", "grow", "grow", "grow", "preempt", "preempt in gather", "abandon"]
            + ["to producer"] * 6
            + ["to consumer"] * 6
            + ["drop", "duplicate", "tick", "wait"]
        ),
        st.integers(0, 7),
    ),
    max_size=80,
)


class World:
    """One pair, and what must hold of it after every step."""

    def __init__(self, num_slots: int) -> None:
        self.pair = Pair(chunk_bytes=32, window=2, num_slots=num_slots)
        self.expected = {i: self.pair.theirs.content(0, ids) for i, ids in BLOCKS.items()}
        self.held: set[int] = set()
        # Of the open ones, where they are computed and how many blocks are finished.
        self.open: dict[int, tuple[tuple[int, ...], int]] = {}
        self.places = dict(BLOCKS)
        self.pulled: set[int] = set()
        self.freed: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.settled: dict[int, bytes] = {}

    def step(self, kind: str, index: int) -> None:
        pair, handoff = self.pair, index % NUM
        name = f"h{handoff}"
        if kind == "hold" and handoff not in self.held:
            self.held.add(handoff)
            pair.hold(BLOCKS[handoff], name=name, key=name)
        elif kind == "open" and handoff not in self.held:
            self.held.add(handoff)
            self.open[handoff] = BLOCKS[handoff], 0
            pair.producer.open(HandoffId(name), name, 1)
        elif handoff in self.open and kind in ("grow", "preempt", "preempt in gather", "abandon"):
            self.compute(kind, handoff)
        elif kind == "pull" and handoff not in self.pulled:
            self.pulled.add(handoff)
            awaits_token = handoff in self.open or handoff not in self.held
            pair.pull(BLOCKS[handoff], offer=pair.offer(name), key=name, awaits_token=awaits_token)
        elif kind == "announce" and handoff not in self.pulled:
            pair.consumer.announce(pair.offer(name), pair.now)
        elif kind == "give up":
            pair.send(pair.consumer.give_up(pair.offer(name)))
        elif kind == "cancel":
            pair.send(pair.consumer.cancel(name))
        elif kind == "abort":
            pair.producer.end(HandoffId(name), ProducerEvent.ABORTED)
        elif kind == "abort in gather":
            pair.late_commands.append(
                lambda: pair.producer.end(HandoffId(name), ProducerEvent.ABORTED)
            )
        else:
            self._wire(kind, index)
        self.check()

    def compute(self, kind: str, handoff: int) -> None:
        """Do what an engine does with an open prompt, up to its end."""
        producer, name = self.pair.producer, HandoffId(f"h{handoff}")
        blocks, num_finished = self.open[handoff]
        if kind == "abandon":
            del self.open[handoff]
            producer.abandon(name, name)
        elif kind == "grow" and num_finished < len(blocks) - 1:
            self.open[handoff] = blocks, num_finished + 1
            producer.grow(Growth(name, ((blocks[num_finished],),)))
        elif kind == "grow":
            del self.open[handoff]
            producer.hold(Hold(name, name, (blocks,), TOKEN), self.pair.now)
        elif kind == "preempt":
            self.preempt(handoff)
        else:
            self.pair.late_commands.append(lambda: self.preempt(handoff))

    def preempt(self, handoff: int) -> None:
        """The blocks are somebody else's at once; the content is computed again elsewhere."""
        if handoff not in self.open:
            return
        blocks, _ = self.open[handoff]
        self.pair.producer.revoke(HandoffId(f"h{handoff}"))
        self.pair.theirs.overwrite(0, blocks, REUSED)
        other = ELSEWHERE[handoff] if blocks == BLOCKS[handoff] else BLOCKS[handoff]
        self.pair.theirs.scatter(0, other, memoryview(self.expected[handoff]))
        self.open[handoff], self.places[handoff] = (other, 0), other

    def _wire(self, kind: str, index: int) -> None:
        pair = self.pair
        if kind == "to producer" and pair.to_producer:
            pair.deliver_to_producer(_take(pair.to_producer, index))
        elif kind == "to consumer" and pair.to_consumer:
            pair.deliver_to_consumer(_take(pair.to_consumer, index))
        elif kind == "drop":
            if index % 2:
                _drop(pair.to_producer, index)
            else:
                _drop(pair.to_consumer, index)
        elif kind == "duplicate":
            if index % 2:
                _duplicate(pair.to_producer, index)
            else:
                _duplicate(pair.to_consumer, index)
        elif kind == "tick":
            pair.tick(UNKNOWN_GRACE_S / 2)
        elif kind == "wait":
            pair.tick(STALL_S * index)

    def check(self) -> None:
        """Do what engines do with what ended: blocks go to somebody else at once."""
        pair = self.pair
        for key in pair.producer.freed:
            assert int(key[1:]) not in self.open, "freed while it is computed"
            pair.theirs.overwrite(0, self.places[int(key[1:])], REUSED)
        self.freed.update(pair.producer.freed)
        pair.producer.freed.clear()
        for ended in pair.consumer.results:
            handoff = int(ended.key[1:])
            if ended.failure is None:
                assert pair.ours.content(0, BLOCKS[handoff]) == self.expected[handoff]
                assert ended.first_token in (None, TOKEN)
            else:
                pair.ours.overwrite(0, BLOCKS[handoff], REUSED)
            self.settled[handoff] = pair.ours.content(0, BLOCKS[handoff])
            self.ended[ended.key] += 1
        pair.consumer.results.clear()
        for handoff, content in self.settled.items():
            assert pair.ours.content(0, BLOCKS[handoff]) == content, "written after its end"
        assert max([*self.freed.values(), *self.ended.values()], default=0) <= 1

    def wind_up(self) -> None:
        """Nothing more is asked: once the engine has ended, time alone must end everything."""
        for handoff in list(self.open):
            self.compute("abandon", handoff)
        for handoff in range(NUM):
            self.pair.send(self.pair.consumer.give_up(self.pair.offer(f"h{handoff}")))
        self.pair.settle()
        self.check()
        self.pair.tick(LEASE_S)
        self.check()
        self.pair.settle()
        self.check()


def _take(queue: "deque[Item]", index: int) -> Item:
    position = index % len(queue)
    item = queue[position]
    del queue[position]
    return item


def _drop(queue: "deque[Item]", index: int) -> None:
    if queue:
        _take(queue, index)


def _duplicate(queue: "deque[Item]", index: int) -> None:
    if queue:
        queue.append(queue[index % len(queue)])


@settings(max_examples=80)
@given(STEPS, st.sampled_from([0, 1, 3]))
def test_every_handoff_ends_once_and_right(steps: list[tuple[str, int]], num_slots: int) -> None:
    world = World(num_slots)
    for kind, index in steps:
        world.step(kind, index)
    world.wind_up()
    assert world.ended == Counter(f"h{handoff}" for handoff in world.pulled)
    assert world.freed == Counter(f"h{handoff}" for handoff in world.held)
    assert world.pair.is_idle()
