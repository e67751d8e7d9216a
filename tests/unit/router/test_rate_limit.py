"""The bucket of permits behind a key's rate: no burst, rate or clock makes it give more."""

from hypothesis import given
from hypothesis import strategies as st

from router.api_keys import ApiKey, digest_of
from router.rate_limit import RateLimits


def key(per_minute: float | None, burst: float | None = None) -> ApiKey:
    return ApiKey(name="k", sha256=digest_of("k"), requests_per_minute=per_minute, burst=burst)


def test_a_key_without_a_limit_is_never_held_up() -> None:
    limits = RateLimits(1)
    assert [limits.take(key(None), 0.0) for _ in range(1000)] == [None] * 1000


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    limits, limited = RateLimits(1), key(60, burst=3)
    assert [limits.take(limited, 10.0) for _ in range(3)] == [None] * 3
    assert limits.take(limited, 10.0) == 1.0
    assert limits.take(limited, 10.5) == 0.5
    assert limits.take(limited, 11.0) is None


def test_each_of_several_routers_has_its_share() -> None:
    limits, limited = RateLimits(2), key(60, burst=4)
    assert [limits.take(limited, 0.0) for _ in range(3)] == [None, None, 2.0]


@given(
    st.floats(1, 6000),
    st.floats(1, 100),
    st.lists(st.floats(0, 5), max_size=60),
)
def test_in_no_span_are_there_more_than_the_burst_and_the_rate(
    per_minute: float, burst: float, gaps: list[float]
) -> None:
    limits, limited, now = RateLimits(1), key(per_minute, burst), 0.0
    taken = []
    for gap in gaps:
        now += gap
        wait_s = limits.take(limited, now)
        if wait_s is None:
            taken.append(now)
        else:
            assert wait_s > 0
            assert RateLimits.take(limits, limited, now) is not None
    for first, start in enumerate(taken):
        for last, end in enumerate(taken[first:], first):
            assert last - first + 1 <= burst + (end - start) * per_minute / 60 + 1e-6


def test_a_clock_that_goes_back_gives_nothing() -> None:
    limits, limited = RateLimits(1), key(60, burst=1)
    assert limits.take(limited, 100.0) is None
    assert limits.take(limited, 50.0) is not None
    assert limits.take(limited, 100.0) is not None
