"""The nouns every part shares: identifiers, roles, legs and stages."""

import enum
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
RouterId = NewType("RouterId", str)
HandoffId = NewType("HandoffId", str)


class Role(enum.StrEnum):
    """Which pool a worker serves in."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> "Role":
        return Role.DECODE if self is Role.PREFILL else Role.PREFILL


class Component(enum.StrEnum):
    """What a process is, and so what it exports; every process exports `EVERY`."""

    ROUTER = "router"
    WORKER = "worker"
    CONTROLLER = "controller"
    EVERY = "every"


class Stage(enum.StrEnum):
    """Where a request is, as its record shows it."""

    QUEUED = "queued"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a leg ended; the first three are the client's `finish_reason` values."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    ABORT = "abort"
    ERROR = "error"
