"""The discovery gate: how many ready workers routers may see."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.gate import num_exposable
from cluster.names import Role

P, D = Role.PREFILL, Role.DECODE
NONE = {P: 0, D: 0}


def exposable(
    ready: tuple[int, int], wanted: tuple[int, int], exposed: tuple[int, int] = (0, 0)
) -> tuple[int, ...]:
    r, w, e = (dict(zip((P, D), pair, strict=True)) for pair in (ready, wanted, exposed))
    return tuple(num_exposable(role, r, e, w, 0.2) for role in (P, D))


def test_the_role_that_is_ahead_waits() -> None:
    # 4:8 wanted; all prefill workers are up, decode starts slower.
    assert exposable((4, 2), (4, 8))[0] == 1
    assert exposable((4, 4), (4, 8))[0] == 2
    assert exposable((4, 7), (4, 8))[0] == 4


def test_nobody_is_shown_alone_but_one_pair_always_is() -> None:
    assert exposable((3, 0), (3, 3))[0] == 0
    assert exposable((3, 1), (1, 9)) == (1, 32)


def test_who_is_shown_stays_shown() -> None:
    assert exposable((4, 1), (4, 8))[0] == 1
    assert exposable((4, 1), (4, 8), exposed=(4, 1))[0] == 4


@given(*[st.integers(0, 50)] * 2, *[st.integers(1, 50)] * 2)
def test_the_smaller_side_is_never_held_back(p: int, d: int, want_p: int, want_d: int) -> None:
    limits = exposable((p, d), (want_p, want_d))
    if p and d:
        assert limits[0] >= p or limits[1] >= d
