"""What a worker's answer other than the one hoped for means: to recovery, and in the record."""

import asyncio

from cluster.errors import (
    ConnectionCut,
    DeadlineExceeded,
    HandoffFailed,
    Overloaded,
    RequestInvalid,
    RetryElsewhere,
    TandemError,
    Unavailable,
    WorkerLost,
)
from cluster.messages import Failed, Rejected, WorkerMessage
from cluster.names import Role
from router.records import Outcome
from router.recovery import Cause


class Refused(RetryElsewhere):
    """The worker takes nothing more at the moment."""


class EngineFailed(WorkerLost):
    """The worker lives but could not run this request."""


def failure_in(answer: WorkerMessage) -> TandemError:
    """Return the error that an answer other than the one hoped for stands for."""
    if isinstance(answer, Rejected):
        return Refused(answer.reason)
    if not isinstance(answer, Failed):
        return EngineFailed(f"the worker answered with {type(answer).__name__} out of turn")
    kinds: dict[str, type[TandemError]] = {"invalid": RequestInvalid, "handoff": HandoffFailed}
    return kinds.get(answer.kind, EngineFailed)(answer.reason)


def cause_of(error: RetryElsewhere, side: Role) -> Cause:
    """Return what the record calls a setback on `side`."""
    is_prefill = side is Role.PREFILL
    if isinstance(error, Refused):
        return Cause.PREFILL_REFUSED if is_prefill else Cause.DECODE_REFUSED
    if isinstance(error, ConnectionCut):
        return Cause.PREFILL_CUT if is_prefill else Cause.DECODE_CUT
    if isinstance(error, HandoffFailed) and not is_prefill:
        return Cause.HANDOFF_FAILED
    if isinstance(error, EngineFailed | HandoffFailed):
        return Cause.PREFILL_FAILED if is_prefill else Cause.DECODE_FAILED
    return Cause.PREFILL_LOST if is_prefill else Cause.DECODE_LOST


def outcome_of(error: BaseException) -> Outcome:
    """Return how a request that `error` ends has ended."""
    if isinstance(error, GeneratorExit | asyncio.CancelledError):
        return Outcome.CANCELLED
    if isinstance(error, Overloaded | Unavailable):
        return Outcome.REJECTED
    if isinstance(error, DeadlineExceeded):
        return Outcome.DEADLINE
    return Outcome.INVALID if isinstance(error, RequestInvalid) else Outcome.ERROR
