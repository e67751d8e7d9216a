"""Hand-offs interrupted at every message: one of each kind is lost, or all from it on."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest

from cluster.messages import Offer
from cluster.names import HandoffId
from kv_transfer.protocol import (
    CODEC,
    Blocks,
    ConsumerMessage,
    Filling,
    Greet,
    ProducerMessage,
    ReadBlocks,
    Refused,
    Release,
    Renew,
    Welcome,
)
from tests.contract.handoff_sides import ACROSS, Open, Side, content
from tests.middleman import FrameMiddleman
from tests.waiting import wait_for

Message = ConsumerMessage | ProducerMessage
# Whether the blocks arrive without it, and when nothing comes after it either.
ARRIVES: dict[type[Message], tuple[bool, bool]] = {
    Renew: (True, False),
    Greet: (True, False),
    Welcome: (True, False),
    ReadBlocks: (False, False),
    Filling: (True, False),
    Blocks: (False, False),
    Refused: (False, False),
    Release: (True, True),
}
# Long enough for a busy machine: what is not lost must arrive.
STALL_S, PRODUCER_LEASE_S, CONSUMER_LEASE_S = 2.0, 2.0, 0.15
THEIRS, OURS = range(1, 40), range(200, 239)
NUMBERS = itertools.count()


class Line:
    """A consumer that pulls over a line which loses the first message of a kind, or goes dead."""

    def __init__(self, consumer: Side, producer: Side, lost: type[Message], is_dead: bool) -> None:
        self.lost = lost
        self.consumer = consumer
        self.name = lost.__name__
        self._before = each(consumer, OURS)
        self._producer = producer
        self._goes_dead = is_dead
        self._has_lost = False
        self._seen: set[type[object]] = set()
        self.middleman = FrameMiddleman(producer.port.endpoint, self._pass)

    def _pass(self, frames: list[bytes], _is_answer: bool) -> Sequence[list[bytes]]:
        message = CODEC.decode(frames[0])
        self._seen.add(type(message))
        if self._has_lost:
            return [] if self._goes_dead else [frames]
        self._has_lost = isinstance(message, self.lost)
        return [] if self._has_lost else [frames]

    def mend(self) -> None:
        """Have one hand-off after the other until one works, with nothing lost any more."""
        self._goes_dead = False
        wait_for(self._works)

    def _works(self) -> bool:
        name = f"{self.name} {next(NUMBERS)}"
        self._producer.hold(name, THEIRS, [])
        self.consumer.pull(self.offer(name), OURS, [])
        return self.end(name) is None

    def offer(self, name: str) -> Offer:
        return replace(self._producer.offer(name), endpoints=(self.middleman.endpoint,))

    def has_come_to(self, kind: type[Message]) -> Callable[[], bool]:
        """Say whether such a message has come, or what comes before it is lost."""
        return lambda: self._has_lost or kind in self._seen

    def end(self, name: str) -> str | None:
        """Wait for the end of a pull and return why it failed; whatever is there must be right."""
        wait_for(self.consumer.has_ended(name))
        failure = self.consumer.pulls[name].failure
        found, right = each(self.consumer, OURS), each(self._producer, THEIRS)
        for ours, theirs, old in zip(found, right, self._before, strict=True):
            assert ours == theirs or (failure and ours == old), f"{self.name}: {failure}"
        return failure


def each(side: Side, block_ids: Sequence[int]) -> list[bytes]:
    return [content(side.store, [block_id]) for block_id in block_ids]


@pytest.mark.parametrize("is_dead", [False, True], ids=["one lost", "dead from there on"])
@pytest.mark.parametrize("kind", ACROSS)
def test_every_message_may_be_lost(open_side: Open, kind: str, is_dead: bool) -> None:
    """Each pull ends, with the blocks or a reason; theirs are freed, and the next one works."""
    producer = open_side(kind, stall_timeout_s=STALL_S, lease_s=PRODUCER_LEASE_S)
    open_consumer = partial(
        open_side, kind, stall_timeout_s=STALL_S, lease_s=CONSUMER_LEASE_S, reads_in_flight=2
    )
    lines = [Line(open_consumer(), producer, lost, is_dead) for lost in ARRIVES]
    with ExitStack() as stack:
        for line in lines:
            stack.enter_context(line.middleman)
            producer.port.open(HandoffId(line.name), line.name)
            line.consumer.port.announce(line.offer(line.name))
        for line in lines:
            wait_for(line.has_come_to(Renew))
            line.consumer.pull(line.offer(line.name), OURS, [])
        for line in lines:
            wait_for(line.has_come_to(Filling))
            if line.lost is Refused:
                producer.port.abandon(HandoffId(line.name), line.name)
            else:
                producer.hold(line.name, THEIRS, [])
        for line in lines:
            failure = line.end(line.name)
            assert (failure is None) == ARRIVES[line.lost][is_dead], f"{line.name}: {failure}"
            wait_for(line.has_come_to(line.lost))
        wait_for(producer.has_freed(*(line.name for line in lines)))
        for line in lines:
            line.mend()
        wait_for(lambda: "held=0 parked=0 out=0" in repr(producer.port))
