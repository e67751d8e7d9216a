"""What a router knows of the workers: the controller's entry for each, and who is ready."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

from cluster.names import Role, WorkerId
from cluster.pairing import NO_LAYOUT, CacheLayout


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """One worker as the controller lists it, once it has passed its warm-up.

    `epoch` names one life of the worker's engine; `domain` its network domain, empty where the
    cluster has no such labels; `exporter` is "host:port" of its metrics; `layout` is its
    KV cache's.
    """

    worker_id: WorkerId
    role: Role
    endpoint: str
    epoch: int
    node: str
    domain: str = ""
    exporter: str = ""
    layout: CacheLayout = NO_LAYOUT

    def as_document(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "role": self.role.value}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Self:
        """Return the entry; raise `TypeError` or `ValueError` for anything but its fields."""
        fields = cast(dict[str, Any], {**document, "role": Role(cast(str, document["role"]))})
        if "layout" in fields:
            fields["layout"] = CacheLayout(**fields["layout"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class ReadyWorker:
    """A listed worker that answers, with the queue and the KV memory it last reported.

    `reported_s` is when that came, by the router's clock.
    """

    entry: WorkerEntry
    num_waiting: int
    block_size: int
    num_blocks: int
    num_free_blocks: int
    reported_s: float
