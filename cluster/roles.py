"""What a worker asks of its role: pure translations between messages and the engine's words."""

from dataclasses import dataclass
from typing import Protocol

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import Decode, Prefill, Rejected, WorkerMessage
from cluster.names import HandoffId, RequestId


@dataclass(frozen=True, slots=True)
class Ending:
    """What ending a request takes: engine requests to abort, held KV caches to free."""

    abort: tuple[RequestId, ...] = ()
    release: tuple[HandoffId, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine output means: news for the router, and whether its table entry goes."""

    message: WorkerMessage | None
    is_last: bool = False


class WorkerRole(Protocol):
    """What a worker does in one role; synchronous, without I/O."""

    def accept(self, message: Prefill | Decode) -> EngineRequest | Rejected: ...

    def report(self, output: EngineOutput) -> Report: ...

    def cancel(self, request_id: RequestId) -> Ending: ...
