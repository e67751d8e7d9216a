"""Reservations: whatever the order, counts are never negative and end at zero."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cluster.names import WorkerId
from router.ledger import Ledger, LedgerError, Reservation, WorkerLoad
from router.policy import Placed

P0, D0 = WorkerId("p0"), WorkerId("d0")


def placed(decode: str = "d0", prefill: str | None = "p0", tokens: int = 10) -> Placed:
    return Placed(WorkerId(decode), WorkerId(prefill) if prefill else None, tokens, True, "test")


def test_a_prompt_takes_compute_first_and_memory_after() -> None:
    ledger = Ledger()
    reservation = ledger.reserve(placed())
    assert repr(ledger) == "<Ledger open=1 d0:0p/0h/1s p0:1p/0h/0s>"
    assert ledger.load(P0) == WorkerLoad(num_prefills=1, prefill_tokens=10)
    ledger.end_prefill(reservation)
    assert ledger.load(P0) == WorkerLoad(num_held=1, held_tokens=10)
    ledger.end_handoff(reservation)
    assert repr(ledger) == "<Ledger open=1 d0:0p/0h/1s>"
    ledger.release(reservation)
    assert repr(ledger) == "<Ledger open=0>"


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_release_gives_back_whatever_is_left(num_steps: int) -> None:
    ledger = Ledger()
    reservation = ledger.reserve(placed())
    for step in [ledger.end_prefill, ledger.end_handoff][:num_steps]:
        step(reservation)
    ledger.release(reservation)
    assert repr(ledger) == "<Ledger open=0>"


def test_a_local_prefill_takes_nothing_on_the_prefill_side() -> None:
    ledger = Ledger()
    reservation = ledger.reserve(placed(prefill=None))
    assert repr(ledger) == "<Ledger open=1 d0:0p/0h/1s>"
    with pytest.raises(LedgerError):
        ledger.end_prefill(reservation)
    ledger.release(reservation)


def test_the_second_release_raises_and_changes_nothing() -> None:
    ledger = Ledger()
    first, second = ledger.reserve(placed()), ledger.reserve(placed())
    ledger.release(first)
    before = repr(ledger)
    with pytest.raises(LedgerError, match="not an open reservation"):
        ledger.release(first)
    with pytest.raises(LedgerError):
        ledger.end_prefill(first)
    assert repr(ledger) == before
    ledger.release(second)


def test_a_foreign_reservation_is_refused() -> None:
    with pytest.raises(LedgerError):
        Ledger().release(Reservation(placed()))


def test_steps_out_of_order_raise_and_change_nothing() -> None:
    ledger = Ledger()
    reservation = ledger.reserve(placed())
    with pytest.raises(LedgerError, match="COMPUTING"):
        ledger.end_handoff(reservation)
    ledger.end_prefill(reservation)
    with pytest.raises(LedgerError, match="HELD"):
        ledger.end_prefill(reservation)
    ledger.check_invariants()


@given(st.lists(st.integers(0, 3), max_size=30))
def test_loads_add_up_over_workers(decodes: list[int]) -> None:
    ledger = Ledger()
    reservations = [ledger.reserve(placed(decode=f"d{number}")) for number in decodes]
    assert ledger.load(P0).num_prefills == len(decodes) == ledger.num_open
    for number in range(4):
        assert ledger.load(WorkerId(f"d{number}")).num_streams == decodes.count(number)
    for reservation in reservations:
        ledger.release(reservation)
    assert repr(ledger) == "<Ledger open=0>"


class Interleaving(RuleBasedStateMachine):
    """Any order of any legal and illegal steps."""

    computing = Bundle("computing")
    held = Bundle("held")
    decoding = Bundle("decoding")
    over = Bundle("over")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.open: set[Reservation] = set()

    @rule(target=computing, decode=st.integers(0, 2), prefill=st.integers(0, 2))
    def reserve(self, decode: int, prefill: int) -> Reservation:
        reservation = self.ledger.reserve(placed(f"d{decode}", f"p{prefill}", decode + 7))
        self.open.add(reservation)
        return reservation

    @rule(target=decoding, decode=st.integers(0, 2))
    def reserve_local(self, decode: int) -> Reservation:
        reservation = self.ledger.reserve(placed(f"d{decode}", None))
        self.open.add(reservation)
        return reservation

    @rule(target=held, reservation=consumes(computing))
    def end_prefill(self, reservation: Reservation) -> Reservation:
        self.ledger.end_prefill(reservation)
        return reservation

    @rule(target=decoding, reservation=consumes(held))
    def end_handoff(self, reservation: Reservation) -> Reservation:
        self.ledger.end_handoff(reservation)
        return reservation

    @rule(
        target=over,
        reservation=st.one_of(consumes(computing), consumes(held), consumes(decoding)),
    )
    def release(self, reservation: Reservation) -> Reservation:
        self.ledger.release(reservation)
        self.open.discard(reservation)
        return reservation

    @rule(reservation=over)
    def release_again(self, reservation: Reservation) -> None:
        with pytest.raises(LedgerError):
            self.ledger.release(reservation)

    @invariant()
    def adds_up(self) -> None:
        self.ledger.check_invariants()
        assert self.ledger.num_open == len(self.open)

    def teardown(self) -> None:
        for reservation in self.open:
            self.ledger.release(reservation)
        assert repr(self.ledger) == "<Ledger open=0>"


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
