"""Changes of workers: which begin and end between two looks, and how long each took."""

from cluster.action_times import ActionTimes, Begun, Change, Ended
from cluster.names import Role, WorkerId
from cluster.worker_state import ObservedWorker, WorkerState

S = WorkerState


def worker(state: WorkerState, since: float, name: str = "p0") -> ObservedWorker:
    return ObservedWorker(WorkerId(name), Role.PREFILL, state, since)


def life(*states: tuple[WorkerState, float], gone_at: float = 0.0) -> list[Begun | Ended]:
    """Look at one worker in each of its states, 0.5 s late, and after its end if it has one."""
    times = ActionTimes()
    news = [each for s in states for each in times.look([worker(*s)], s[1] + 0.5)]
    return news + (times.look([], gone_at) if gone_at else [])


def test_a_start_lasts_from_the_order_until_ready() -> None:
    states = ((S.PENDING, 10.0), (S.STARTING, 11.0), (S.WARMING, 14.0), (S.READY, 17.5))
    assert life(*states) == [Begun(Change.START), Ended(Change.START, 7.5)]


def test_a_start_that_fails_has_no_duration() -> None:
    news = life((S.STARTING, 10.0), (S.STOPPING, 12.0), gone_at=13.0)
    assert news == [Begun(Change.START), Begun(Change.STOP), Ended(Change.STOP, 1.0)]


def test_a_flip_and_an_activation_are_told_apart() -> None:
    flip = life((S.READY, 0.0), (S.FLIPPING, 5.0), (S.READY, 5.75))
    assert flip == [Begun(Change.FLIP), Ended(Change.FLIP, 0.75)]
    activation = life((S.STANDBY, 0.0), (S.FLIPPING, 5.0), (S.READY, 5.25))
    assert activation == [Begun(Change.ACTIVATE), Ended(Change.ACTIVATE, 0.25)]


def test_a_drain_lasts_from_being_taken_out() -> None:
    news = life((S.READY, 0.0), (S.SOFT_OUT, 10.0), (S.DRAINING, 20.0), (S.STOPPING, 24.0))
    assert news == [Begun(Change.DRAIN), Ended(Change.DRAIN, 14.0), Begun(Change.STOP)]
    parked = life((S.READY, 0.0), (S.DRAINING, 10.0), (S.STANDBY, 11.0))
    assert parked == [Begun(Change.DRAIN), Ended(Change.DRAIN, 1.0)]


def test_a_worker_taken_back_is_restored() -> None:
    news = life((S.READY, 0.0), (S.SOFT_OUT, 10.0), (S.READY, 12.0))
    assert news == [Begun(Change.DRAIN), Begun(Change.RESTORE)]


def test_what_was_going_on_before_the_first_look_is_not_timed() -> None:
    assert life((S.FLIPPING, 0.0), (S.READY, 3.0)) == []
    assert life((S.DRAINING, 0.0), (S.STOPPING, 3.0)) == [Begun(Change.STOP)]


def test_a_state_that_stays_is_no_news() -> None:
    times = ActionTimes()
    first = [worker(S.PENDING, 1.0), worker(S.READY, 0.0, "d0")]
    assert times.look(first, 1.0) == [Begun(Change.START)]
    assert times.look(first, 2.0) == times.look(first, 3.0) == []
