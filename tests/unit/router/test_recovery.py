"""After a setback: who is kept away from, and when a request gives up."""

import pytest

from cluster.config import RouterSection
from cluster.names import WorkerId
from router.policy import Placed
from router.recovery import Cause, Tries, should_retry

CONFIG = RouterSection(max_attempts=4)
PLACED = Placed(WorkerId("d0"), WorkerId("p0"), 100, True, "idle")


@pytest.mark.parametrize(
    ("cause", "excluded"),
    [
        (Cause.PREFILL_REFUSED, "p0"),
        (Cause.PREFILL_LOST, "p0"),
        (Cause.PREFILL_FAILED, "p0"),
        (Cause.DECODE_REFUSED, "d0"),
        (Cause.DECODE_LOST, "d0"),
        (Cause.DECODE_FAILED, "d0"),
    ],
)
def test_the_worker_at_fault_is_excluded(cause: Cause, excluded: str) -> None:
    tries = Tries().after(cause, PLACED)
    assert tries.excluded == {excluded} and not tries.avoided
    assert tries.num_attempts == 2


@pytest.mark.parametrize(
    ("cause", "avoided"), [(Cause.PREFILL_CUT, "p0"), (Cause.DECODE_CUT, "d0")]
)
def test_a_worker_whose_connection_was_cut_is_avoided(cause: Cause, avoided: str) -> None:
    tries = Tries().after(cause, PLACED)
    assert tries.avoided == {avoided} and not tries.excluded


def test_after_one_failed_handoff_both_workers_are_avoided() -> None:
    request = Tries().after(Cause.HANDOFF_FAILED, PLACED).request(100, False, CONFIG)
    assert request.avoided == {"p0", "d0"} and not request.excluded
    assert not request.is_last_resort and request.is_admitted


def test_after_two_failed_handoffs_decode_computes_the_prompt() -> None:
    tries = Tries().after(Cause.HANDOFF_FAILED, PLACED).after(Cause.HANDOFF_FAILED, PLACED)
    assert tries.request(100, False, CONFIG).is_last_resort


def test_the_last_attempt_takes_no_more_chances() -> None:
    tries = Tries()
    for _ in range(3):
        assert not tries.request(100, False, CONFIG).is_last_resort
        tries = tries.after(Cause.PREFILL_LOST, PLACED)
    assert tries.num_attempts == 4
    assert tries.request(100, False, CONFIG).is_last_resort


def test_the_first_attempt_is_never_a_last_resort() -> None:
    request = Tries().request(100, True, RouterSection(max_attempts=1))
    assert not request.is_last_resort and not request.is_admitted and request.local_only


def test_attempts_are_bounded() -> None:
    tries = Tries()
    for _ in range(3):
        assert should_retry(tries, Cause.DECODE_LOST, CONFIG)
        tries = tries.after(Cause.DECODE_LOST, PLACED)
    assert not should_retry(tries, Cause.DECODE_LOST, CONFIG)


@pytest.mark.parametrize("cause", Cause)
def test_without_recovery_a_lost_cache_ends_the_request(cause: Cause) -> None:
    config = RouterSection(recovery="none")
    is_cache_lost = cause in {
        Cause.HANDOFF_FAILED,
        Cause.PREFILL_LOST,
        Cause.PREFILL_FAILED,
        Cause.PREFILL_CUT,
    }
    assert should_retry(Tries(), cause, config) is not is_cache_lost


def test_without_recovery_nothing_is_computed_on_decode_as_a_last_resort() -> None:
    config = RouterSection(recovery="none", max_attempts=2)
    tries = Tries().after(Cause.PREFILL_REFUSED, PLACED)
    assert not tries.request(100, False, config).is_last_resort
