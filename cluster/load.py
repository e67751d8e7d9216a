"""What the cluster is doing: the numbers that workers and routers report to the controller.

Counters are cumulative over one life (a worker's epoch, a router's id), so a lost report costs
nothing but resolution.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from cluster.latency import LatencyCounts
from cluster.names import Role, RouterId, WorkerId
from cluster.worker_state import WorkerState


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker; `at` is when the controller received the numbers, None before the first.

    `computed_prompt_tokens` counts prompt tokens that no cache held (prefill role),
    `generated_tokens` tokens made in the decode role. `busy_s` is how long the worker had at
    least one request open: a stand-in for utilisation that every engine can report.
    """

    worker_id: WorkerId
    role: Role
    state: WorkerState
    epoch: int
    at: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_held_blocks: int = 0
    generated_tokens: int = 0
    computed_prompt_tokens: int = 0
    busy_s: float = 0.0

    def as_document(self) -> dict[str, object]:
        words = {"role": self.role.value, "state": self.state.value}
        return {**dataclasses.asdict(self), **words}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Return the load; raise `KeyError`, `TypeError` or `ValueError` for anything else."""
        fields = cast(dict[str, Any], dict(document))
        fields |= {"role": Role(fields["role"]), "state": WorkerState(fields["state"])}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """One router: `prompt_tokens` of arrived requests, `output_tokens` of finished ones,
    `handoffs` with the bytes that decode received, and those that failed."""

    router_id: RouterId
    at: float
    arrived: int = 0
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    handoffs: int = 0
    handoff_bytes: int = 0
    handoff_failures: int = 0
    ttft: LatencyCounts = field(default_factory=LatencyCounts)
    tbt: LatencyCounts = field(default_factory=LatencyCounts)

    def as_document(self) -> dict[str, object]:
        histograms = {"ttft": self.ttft.as_document(), "tbt": self.tbt.as_document()}
        names = (each.name for each in dataclasses.fields(self))
        counters = {name: getattr(self, name) for name in names if name not in histograms}
        return {**counters, **histograms}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Return the load; raise `KeyError`, `TypeError` or `ValueError` for anything else."""
        fields = cast(dict[str, Any], dict(document))
        for name in ("ttft", "tbt"):
            fields[name] = LatencyCounts.from_document(fields[name])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """Every worker and router as the controller knows them at `at`."""

    at: float
    workers: tuple[WorkerLoad, ...] = ()
    routers: tuple[RouterLoad, ...] = ()

    def as_document(self) -> dict[str, object]:
        return {
            "at": self.at,
            "workers": [worker.as_document() for worker in self.workers],
            "routers": [router.as_document() for router in self.routers],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Return the load; raise `KeyError`, `TypeError` or `ValueError` for anything else."""
        fields = cast(dict[str, Any], document)
        return cls(
            fields["at"],
            tuple(WorkerLoad.from_document(worker) for worker in fields["workers"]),
            tuple(RouterLoad.from_document(router) for router in fields["routers"]),
        )
