"""The controller's notes on its workers, and how they survive it."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self

from cluster.load import WorkerLoad
from cluster.names import Role, WorkerId
from cluster.pairing import refusal
from cluster.request_plane import WorkerLink
from cluster.ring_file import KeySource
from cluster.service import PlacedWorker, Tenure
from cluster.snapshot import WorkerEntry
from cluster.sockets import plain_address
from cluster.worker_spec import Seat, WorkerSpec
from cluster.worker_state import ObservedWorker, Pair, Trouble, WorkerState

_HAS_SERVED = (
    WorkerState.FLIPPING,
    WorkerState.SOFT_OUT,
    WorkerState.DRAINING,
    WorkerState.STANDBY,
)
# A worker that fails after this long in service is no sign that the next one will not start.
_PROBATION_S = 60.0


class WorkerHandle(Protocol):
    """A worker's process, wherever it runs.

    Whatever changes it carries the controller's epoch and raises `Fenced` if a later one gave
    an order before.
    """

    async def seat(self) -> Seat: ...

    async def adopt(self, controller_epoch: int) -> WorkerEntry | None:
        """Return the entry of a worker that was started before, once it is up; else None."""
        ...

    async def start(self, spec: WorkerSpec, controller_epoch: int) -> WorkerEntry: ...

    async def wait(self) -> None:
        """Return or raise when the process is gone."""

    async def stop(self, controller_epoch: int) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    """How the controller gets at processes of workers, and by which keys it knows them."""

    @property
    def keys(self) -> KeySource | None: ...

    def launch(self, worker_id: WorkerId, role: Role, node_id: str | None) -> WorkerHandle:
        """Ask for a new process, on a node if one is given; it may take its time."""
        ...

    def attach(self, worker_id: WorkerId) -> WorkerHandle | None:
        """Return the process an earlier controller launched, None if there is none."""
        ...


@dataclass(slots=True)
class Member:
    """One worker and what the controller knows of it; times are Unix seconds."""

    worker_id: WorkerId
    role: Role
    handle: WorkerHandle
    asked_at: float
    since: float
    state: WorkerState = WorkerState.PENDING
    node_id: str | None = None
    is_spare: bool = False
    seat: Seat | None = None
    cpus: tuple[int, ...] = ()
    entry: WorkerEntry | None = None
    link: WorkerLink | None = None
    start_s: float | None = None
    work: asyncio.Task[None] | None = None  # what brings it up

    def enter(self, state: WorkerState, now: float) -> None:
        self.state, self.since = state, now

    def is_new(self, now: float) -> bool:
        """Return whether a failure of the worker speaks against starting the next one."""
        if self.state is not WorkerState.READY:
            return self.state not in _HAS_SERVED
        return now - self.since < _PROBATION_S

    def listing(self) -> WorkerEntry | None:
        """Return what routers are told of the worker, None if they are not to use it."""
        is_listed = self.state in (WorkerState.READY, WorkerState.FLIPPING)
        return replace(self.entry, role=self.role) if is_listed and self.entry else None

    def observe(self) -> ObservedWorker:
        seen = ObservedWorker(self.worker_id, self.role, self.state, self.since, self.is_spare)
        if self.entry is not None:
            seen = replace(seen, layout=self.entry.layout)
        snapshot = self.link.snapshot if self.link else None
        if snapshot is None:
            return seen
        return replace(
            seen,
            reported_role=snapshot.role,
            num_requests=snapshot.num_requests,
            num_held_blocks=snapshot.num_held_blocks,
            work=snapshot.generated_tokens + snapshot.computed_prompt_tokens,
        )

    def load(self, now: float, loop_s: float) -> WorkerLoad:
        """Return the worker's load; `loop_s` is the event loop's time at `now`."""
        epoch = self.entry.epoch if self.entry else 0
        load = WorkerLoad(self.worker_id, self.role, self.state, epoch)
        snapshot = self.link.snapshot if self.link else None
        if self.link is None or snapshot is None:
            return load
        return replace(
            load,
            at=now - (loop_s - self.link.snapshot_s),
            num_running=snapshot.num_running,
            num_waiting=snapshot.num_waiting,
            num_blocks=snapshot.num_blocks,
            num_free_blocks=snapshot.num_free_blocks,
            num_held_blocks=snapshot.num_held_blocks,
            generated_tokens=snapshot.generated_tokens,
            computed_prompt_tokens=snapshot.computed_prompt_tokens,
            busy_s=snapshot.busy_s,
        )

    def placed(self) -> PlacedWorker | None:
        """Return where the worker is, None if nobody has said; Ray knows of it once it sits."""
        node_id = self.seat.node if self.seat else self.node_id
        if node_id is None:
            return None
        tenure = Tenure.HELD if self.seat else Tenure.CLAIMED
        if self.state in (WorkerState.SOFT_OUT, WorkerState.DRAINING, WorkerState.STOPPING):
            tenure = Tenure.LEAVING
        seen = self.observe()
        loss = float(seen.num_held_blocks + seen.work)
        return PlacedWorker(self.worker_id, self.role, node_id, tenure, loss)

    def describe(self) -> dict[str, Any]:
        """Return what an operator wants to see, JSON-able."""
        snapshot = self.link.snapshot if self.link else None
        return {
            "worker_id": self.worker_id,
            "role": self.role.value,
            "state": self.state.value,
            "since": self.since,
            "is_spare": self.is_spare,
            "node": self.seat.node if self.seat else None,
            "pid": self.seat.pid if self.seat else None,
            "cpus": list(self.cpus),
            "endpoint": plain_address(self.entry.endpoint) if self.entry else None,
            "start_s": self.start_s,
            "num_running": snapshot.num_running if snapshot else None,
            "num_free_blocks": snapshot.num_free_blocks if snapshot else None,
            "num_held_blocks": snapshot.num_held_blocks if snapshot else None,
        }

    def as_document(self) -> dict[str, Any]:
        """Return what the next controller needs to take the worker over."""
        return {
            "worker_id": self.worker_id,
            "role": self.role.value,
            "state": self.state.value,
            "asked_at": self.asked_at,
            "since": self.since,
            "node_id": self.node_id,
            "is_spare": self.is_spare,
            "seat": asdict(self.seat) if self.seat else None,
            "cpus": list(self.cpus),
            "start_s": self.start_s,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], handle: WorkerHandle) -> Self:
        seat = document["seat"]
        return cls(
            WorkerId(document["worker_id"]),
            Role(document["role"]),
            handle,
            document["asked_at"],
            document["since"],
            WorkerState(document["state"]),
            document["node_id"],
            document["is_spare"],
            Seat(**{**seat, "cores": tuple(seat["cores"])}) if seat else None,
            tuple(document["cpus"]),
            start_s=document["start_s"],
        )


def unpaired(newcomer: Member, members: Iterable[Member]) -> str | None:
    """Return why a worker that has just come up hands over to none or only some of the others."""
    others = (m for m in members if m.role is not newcomer.role)
    known = {m.worker_id: m.entry.layout for m in others if m.entry is not None}
    assert newcomer.entry is not None
    return refusal((newcomer.worker_id, newcomer.entry.layout), known.items())


@dataclass(slots=True)
class History:
    """What the plan needs to remember between ticks."""

    proven: set[Pair] = field(default_factory=set)
    testing: set[Pair] = field(default_factory=set)
    failed_proofs: dict[Pair, Trouble] = field(default_factory=dict)
    failed_starts: dict[Role, Trouble] = field(default_factory=dict)

    def count_failure(self, role: Role, reason: str, now: float) -> None:
        earlier = self.failed_starts.get(role)
        failures = earlier.failures + 1 if earlier else 1
        self.failed_starts[role] = Trouble(failures, now, reason)

    def heed_clock(self, now: float) -> None:
        """Let nothing have failed later than now."""
        self.failed_proofs = {k: t.by_clock(now) for k, t in self.failed_proofs.items()}
        self.failed_starts = {k: t.by_clock(now) for k, t in self.failed_starts.items()}

    def forget(self, worker_id: WorkerId) -> None:
        self.proven = {pair for pair in self.proven if worker_id not in pair}
        for pair in [pair for pair in self.failed_proofs if worker_id in pair]:
            del self.failed_proofs[pair]
