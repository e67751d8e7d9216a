"""Leases: each expires once, `duration_s` after it was last touched, oldest first."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.names import HandoffId
from kv_transfer.leases import LeaseTable

A, B, C = HandoffId("a"), HandoffId("b"), HandoffId("c")


def test_a_lease_expires_by_duration() -> None:
    leases = LeaseTable(10)
    leases.touch(A, 100)
    assert list(leases.take_expired(109.9)) == []
    assert list(leases.take_expired(110)) == [A]
    assert list(leases.take_expired(200)) == []
    assert len(leases) == 0


def test_touching_starts_it_again() -> None:
    leases = LeaseTable(10)
    leases.touch(A, 0)
    leases.touch(B, 1)
    leases.touch(A, 9)
    assert list(leases.take_expired(12)) == [B]
    assert list(leases.take_expired(19)) == [A]


def test_ended_leases_do_not_expire() -> None:
    leases = LeaseTable(10)
    leases.touch(A, 0)
    leases.end(A)
    leases.end(C)
    assert list(leases.take_expired(100)) == []


def test_repr_is_one_line() -> None:
    leases = LeaseTable(10)
    leases.touch(A, 0)
    assert repr(leases) == "<LeaseTable 1 leases of 10 s>"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["touch", "end", "take"]),
            st.sampled_from([A, B, C]),
            st.integers(0, 7),
        ),
        max_size=60,
    )
)
def test_agrees_with_a_plain_dict(steps: list[tuple[str, HandoffId, int]]) -> None:
    leases, model, now = LeaseTable(10), dict[HandoffId, int](), 0
    for kind, handoff_id, dt in steps:
        now += dt
        if kind == "touch":
            leases.touch(handoff_id, now)
            model[handoff_id] = now
        elif kind == "end":
            leases.end(handoff_id)
            model.pop(handoff_id, None)
        else:
            expired = {key for key, since in model.items() if now - since >= 10}
            assert set(leases.take_expired(now)) == expired
            model = {key: since for key, since in model.items() if key not in expired}
        assert len(leases) == len(model)
