"""What becomes of workers between two looks at them: changes begun, and how long each took. Pure.

The states' own times are used, so a change takes what it took however seldom somebody looks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from cluster.names import WorkerId
from cluster.worker_state import ObservedWorker, WorkerState


class Change(StrEnum):
    """What can happen to a worker that takes time."""

    START = "start"  # asked for until Ready, or until on standby
    ACTIVATE = "activate"  # a standby until Ready
    FLIP = "flip"  # to the other role until Ready
    RESTORE = "restore"  # taken out and Ready again
    DRAIN = "drain"  # taken out until stopped
    STOP = "stop"  # until gone


@dataclass(frozen=True, slots=True)
class Begun:
    change: Change


@dataclass(frozen=True, slots=True)
class Ended:
    change: Change
    seconds: float


_OUT = (WorkerState.SOFT_OUT, WorkerState.DRAINING)
_SETTLED = (WorkerState.READY, WorkerState.STANDBY)
_ASKED_FOR = (WorkerState.PENDING, WorkerState.STARTING)


@dataclass(frozen=True, slots=True)
class _Course:
    """A worker's latest state, and the change it is in; `began` in Unix seconds."""

    state: WorkerState
    change: Change | None
    began: float


class ActionTimes:
    """Follows every worker from one look to the next.

    What a worker was in the middle of at the first look at it is not known and not timed, unless
    it was only just asked for.
    """

    def __init__(self) -> None:
        self._courses: dict[WorkerId, _Course] = {}

    def look(self, workers: Iterable[ObservedWorker], now: float) -> list[Begun | Ended]:
        """Return what has begun and ended since the last look; `now` is Unix seconds."""
        seen = {worker.worker_id: worker for worker in workers}
        news: list[Begun | Ended] = []
        for worker_id in self._courses.keys() - seen.keys():
            news += _close(self._courses.pop(worker_id), now)
        for worker_id, worker in seen.items():
            course = self._courses.get(worker_id)
            self._courses[worker_id], told = _follow(course, worker)
            news += told
        return news


def _follow(course: _Course | None, worker: ObservedWorker) -> tuple[_Course, list[Begun | Ended]]:
    state, since = worker.state, worker.since
    if course is None:
        if state in _ASKED_FOR:
            return _Course(state, Change.START, since), [Begun(Change.START)]
        return _Course(state, None, since), []
    if state is course.state:
        return course, []
    if state in _SETTLED:
        return _settle(course, worker)
    if state in _OUT and course.state not in _OUT:
        return _Course(state, Change.DRAIN, since), [Begun(Change.DRAIN)]
    if state is WorkerState.STOPPING:
        return _Course(state, Change.STOP, since), [*_close(course, since), Begun(Change.STOP)]
    if state is WorkerState.FLIPPING:
        change = Change.ACTIVATE if course.state is WorkerState.STANDBY else Change.FLIP
        return _Course(state, change, since), [Begun(change)]
    return _Course(state, course.change, course.began), []


def _settle(course: _Course, worker: ObservedWorker) -> tuple[_Course, list[Begun | Ended]]:
    """A worker has come to serve or to stand by: that ends what it was in."""
    settled = _Course(worker.state, None, worker.since)
    if worker.state is WorkerState.READY and course.state in _OUT:
        return settled, [Begun(Change.RESTORE)]
    return settled, list(_ended(course, worker.since))


def _close(course: _Course, at: float) -> Iterator[Ended]:
    """A worker stops or is gone: a start, a flip or an activation has then come to nothing."""
    if course.change in (Change.DRAIN, Change.STOP):
        yield from _ended(course, at)


def _ended(course: _Course, at: float) -> Iterator[Ended]:
    if course.change is not None:
        yield Ended(course.change, max(0.0, at - course.began))
