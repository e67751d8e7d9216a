"""Choosing and reserving in one step, and the line in front of it."""

from collections.abc import Sequence
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.config import RouterSection
from cluster.names import Role, WorkerId
from cluster.snapshot import ReadyWorker, WorkerEntry
from router.admission import Admission, Ticket
from router.ledger import Reservation
from router.policy import PlacementRequest, RejectedPlacement, Rejection

CONFIG = RouterSection(prefills_per_worker=1, decodes_per_worker=2, max_queued=3)
LONG = PlacementRequest(num_prompt_tokens=100)


def ready(*names: str, free: int = 100, reported_s: float = 0.0) -> list[ReadyWorker]:
    """Return idle workers with `free` of 100 blocks of 16 tokens."""
    roles = {"p": Role.PREFILL, "d": Role.DECODE}
    memory = 16, 100, free, reported_s
    return [
        ReadyWorker(WorkerEntry(WorkerId(name), roles[name[0]], "tcp://x", 1, "n"), 0, *memory)
        for name in names
    ]


class Line:
    """An admission over workers that a test may swap, and who was woken in which order."""

    def __init__(self, *names: str, config: RouterSection = CONFIG) -> None:
        self.workers: Sequence[ReadyWorker] = ready(*names)
        self.admission = Admission(config, lambda: self.workers)
        self.woken: list[int] = []

    def enter(self, request: PlacementRequest = LONG, order: int | None = None) -> Ticket:
        place = self.admission.next_order() if order is None else order
        ticket = self.admission.enter(request, place, lambda: self.woken.append(place))
        self.admission.check_invariants()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        self.admission.leave(ticket)
        self.admission.check_invariants()

    def change(self, *names: str, free: int = 100, reported_s: float = 0.0) -> None:
        self.workers = ready(*names, free=free, reported_s=reported_s)
        self.admission.redecide()


def prefill_of(ticket: Ticket) -> str | None:
    assert isinstance(ticket.answer, Reservation)
    return ticket.answer.placement.prefill_worker


def test_two_requests_never_take_the_same_place() -> None:
    line = Line("p0", "p1", "d0")
    assert {prefill_of(line.enter()), prefill_of(line.enter())} == {"p0", "p1"}
    assert line.enter().answer is None


def test_waiters_are_served_in_order_as_prompts_end() -> None:
    line = Line("p0", "d0", "d1")
    tickets = [line.enter() for _ in range(4)]
    for number in range(3):
        answer = tickets[number].answer
        assert isinstance(answer, Reservation)
        line.admission.end_prefill(answer)
        assert line.woken == list(range(1, number + 2))
    assert repr(line.admission).startswith("<Admission waiting=0 <Ledger open=4")


def test_a_newcomer_does_not_overtake() -> None:
    line = Line("p0", "d0", "d1")
    first, second = line.enter(), line.enter()
    short = line.enter(PlacementRequest(num_prompt_tokens=1))
    assert line.admission.num_waiting == 2
    line.leave(first)
    assert second.answer is not None and short.answer is not None
    assert line.woken == [1, 2]


def test_a_waiter_that_leaves_lets_the_next_one_up() -> None:
    line = Line("p0", "d0", "d1")
    line.enter()
    long, short = line.enter(), line.enter(PlacementRequest(num_prompt_tokens=1))
    line.leave(long)
    assert line.woken == [2] and isinstance(short.answer, Reservation)


def test_leaving_after_the_answer_but_before_noticing_it_gives_the_room_back() -> None:
    line = Line("p0", "d0")
    first, second = line.enter(), line.enter()
    line.leave(first)
    assert isinstance(second.answer, Reservation)
    line.leave(second)
    assert line.admission.ledger.num_open == 0


def test_a_full_line_turns_newcomers_away_but_not_those_admitted_before() -> None:
    line = Line("p0", "d0", "d1")
    for _ in range(4):
        line.enter()
    refused = line.enter().answer
    assert isinstance(refused, RejectedPlacement) and refused.rejection is Rejection.OVERLOADED
    retry = line.enter(PlacementRequest(100, is_admitted=True))
    assert retry.answer is None and line.admission.num_waiting == 4


def test_a_request_tried_again_keeps_its_place() -> None:
    line = Line("p0", "d0", "d1")
    order = line.admission.next_order()
    first = line.enter()
    later = [line.enter() for _ in range(2)]
    line.enter(PlacementRequest(100, is_admitted=True), order)
    line.leave(first)
    assert line.woken == [order] and all(ticket.answer is None for ticket in later)


def test_a_request_that_may_not_use_a_worker_does_not_hold_up_others() -> None:
    line = Line("p0", "p1", "d0", "d1")
    picky_order = line.admission.next_order()
    tickets = [line.enter(), line.enter()]
    keeps_off = frozenset({WorkerId("p0")})
    picky = line.enter(PlacementRequest(100, is_admitted=True, excluded=keeps_off), picky_order)
    waiter = line.enter()
    line.leave(next(ticket for ticket in tickets if prefill_of(ticket) == "p0"))
    assert line.admission.num_waiting == 1 and prefill_of(waiter) == "p0"
    line.leave(next(ticket for ticket in tickets if prefill_of(ticket) == "p1"))
    assert prefill_of(picky) == "p1"


def test_decode_memory_is_promised_with_the_placement() -> None:
    line = Line("p0", "p1", "d0")
    half = PlacementRequest(num_prompt_tokens=50 * 16 - 1)
    first, second, third = line.enter(half), line.enter(half), line.enter(half)
    assert isinstance(first.answer, Reservation) and isinstance(second.answer, Reservation)
    assert third.answer is None
    line.leave(second)
    assert isinstance(third.answer, Reservation)


def test_a_promise_is_kept_until_a_report_can_show_the_blocks() -> None:
    line = Line("p0", "p1", "d0")
    line.admission.ledger.ask_decode(_answer(line.enter(PlacementRequest(60 * 16))), now=10.0)
    waiter = line.enter(PlacementRequest(39 * 16))
    line.change("p0", "p1", "d0", free=100, reported_s=10.1)
    assert waiter.answer is None, "that report may be older than the blocks"
    line.change("p0", "p1", "d0", free=39, reported_s=10.6)
    assert waiter.answer is None, "39 blocks have no room for the token after the prompt"
    line.change("p0", "p1", "d0", free=40, reported_s=11.1)
    assert isinstance(waiter.answer, Reservation)


def _answer(ticket: Ticket) -> Reservation:
    assert isinstance(ticket.answer, Reservation)
    return ticket.answer


def test_new_workers_take_the_first_in_line() -> None:
    line = Line("p0", "d0", "d1")
    tickets = [line.enter() for _ in range(3)]
    line.change("p0", "p1", "d0", "d1")
    assert line.woken == [1] and prefill_of(tickets[1]) == "p1"


def test_waiters_are_refused_when_the_decode_pool_is_gone() -> None:
    line = Line("p0", "d0")
    line.enter()
    waiter = line.enter()
    line.change("p0")
    assert isinstance(waiter.answer, RejectedPlacement) and line.woken == [1]
    line.leave(waiter)


def test_waiters_go_local_when_the_prefill_pool_is_gone() -> None:
    line = Line("p0", "d0")
    line.enter()
    waiter = line.enter()
    line.change("d0")
    assert prefill_of(waiter) is None


class Traffic(RuleBasedStateMachine):
    """Requests and workers come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = ready("p0", "p1", "d0", "d1")
        config = RouterSection(prefills_per_worker=2, decodes_per_worker=3, max_queued=5)
        self.config = config
        self.admission = Admission(config, lambda: self.workers, Random(0))
        self.tickets: list[Ticket] = []

    @rule(tokens=st.integers(1, 3), excluded=st.sampled_from(["", "p0", "d1"]))
    def enter(self, tokens: int, excluded: str) -> None:
        keeps_off = frozenset({WorkerId(excluded)} if excluded else ())
        request = PlacementRequest(tokens, excluded=keeps_off)
        ticket = self.admission.enter(request, self.admission.next_order())
        if isinstance(ticket.answer, Reservation):
            self.check_new(ticket.answer)
        self.tickets.append(ticket)

    def check_new(self, reservation: Reservation) -> None:
        ready_ids = {worker.entry.worker_id for worker in self.workers}
        assert reservation.placement.decode_worker in ready_ids
        assert reservation.placement.prefill_worker in ready_ids | {None}

    @rule(number=st.integers(0, 50))
    def leave(self, number: int) -> None:
        if self.tickets:
            self.admission.leave(self.tickets.pop(number % len(self.tickets)))

    @rule(number=st.integers(0, 50))
    def end_prefill(self, number: int) -> None:
        computing = [
            ticket.answer
            for ticket in self.tickets
            if isinstance(ticket.answer, Reservation) and ticket.answer.side.name == "COMPUTING"
        ]
        if computing:
            self.admission.end_prefill(computing[number % len(computing)])

    @rule(names=st.sets(st.sampled_from(["p0", "p1", "p2", "d0", "d1", "d2"])))
    def change(self, names: set[str]) -> None:
        self.workers = ready(*sorted(names))
        self.admission.redecide()

    @invariant()
    def is_sound(self) -> None:
        self.admission.check_invariants()
        for worker in self.workers:
            load = self.admission.ledger.load(worker.entry.worker_id)
            assert load.num_prefills <= self.config.prefills_per_worker
            assert load.num_streams <= self.config.decodes_per_worker

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        waiting = self.admission.num_waiting
        self.admission.redecide()
        assert self.admission.num_waiting == waiting

    def teardown(self) -> None:
        for ticket in self.tickets:
            self.admission.leave(ticket)
        assert repr(self.admission) == "<Admission waiting=0 <Ledger open=0>>"


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
