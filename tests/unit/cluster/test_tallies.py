"""Counts of both ends, as they go over a connection that breaks."""

from cluster.messages import Tally
from cluster.tallies import TallyReader, Traffic


class Ends:
    """A router that sends and a worker that answers; what is `lost` does not arrive."""

    def __init__(self) -> None:
        self.router, self.worker = Traffic(), Traffic()
        self.reader = TallyReader()

    def ask(self, number: int = 1, lost: int = 0) -> None:
        self.router.num_sent += number
        self.worker.num_received += number - lost

    def answer(self, number: int = 1, lost: int = 0) -> None:
        self.worker.num_sent += number
        self.router.num_received += number - lost

    def beat(self) -> list[int] | None:
        tally = Tally(self.router.num_sent, self.worker.num_received, self.worker.num_sent)
        suspects = self.reader.read(tally, self.router.num_received)
        return None if suspects is None else list(suspects)


def test_nothing_is_suspected_while_everything_comes() -> None:
    ends = Ends()
    assert ends.beat() is None
    for _ in range(3):
        ends.ask(2)
        ends.answer(7)
        assert ends.beat() is None


def test_a_lost_answer_may_be_anybodys_that_had_asked() -> None:
    ends = Ends()
    ends.ask(3)
    assert ends.beat() is None
    ends.answer(5, lost=1)
    assert ends.beat() == [1, 2, 3]


def test_a_lost_request_is_one_of_those_since_the_last_tally() -> None:
    ends = Ends()
    ends.ask(3)
    assert ends.beat() is None
    ends.ask(2, lost=1)
    ends.answer(4)
    assert ends.beat() == [4, 5]


def test_a_loss_is_told_once() -> None:
    ends = Ends()
    ends.beat()
    ends.ask(lost=1)
    ends.answer(2, lost=2)
    assert ends.beat() == [1]
    ends.ask(4)
    ends.answer(4)
    assert ends.beat() is None


def test_what_a_link_finds_at_first_is_no_loss() -> None:
    ends = Ends()
    ends.worker = Traffic(num_received=8, num_sent=40)
    assert ends.beat() is None
    ends.ask()
    assert ends.beat() is None


def test_a_worker_that_counts_afresh_has_forgotten_everything() -> None:
    ends = Ends()
    ends.ask(3)
    assert ends.beat() is None
    ends.worker = Traffic()
    assert ends.beat() == [1, 2, 3]


def test_what_was_sent_after_the_heartbeat_is_not_suspected() -> None:
    ends = Ends()
    ends.beat()
    ends.ask(2, lost=1)
    tally = Tally(ends.router.num_sent, ends.worker.num_received, ends.worker.num_sent)
    ends.ask(5)
    assert ends.reader.read(tally, ends.router.num_received) == range(1, 3)
