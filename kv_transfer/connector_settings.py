"""What crosses between the halves of vLLM's connector, and how it is configured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from cluster.config import HandoffSection
from cluster.messages import Offer, Receipt
from cluster.names import HandoffId, WorkerId
from cluster.pairing import CacheLayout
from kv_transfer.consumer import Pull
from kv_transfer.producer import Hold
from kv_transfer.progress import Growth


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """`kv_connector_extra_config`, typed. `epoch` names this life of the engine, `keys` the file
    with the deployment's CURVE keys."""

    worker_id: WorkerId
    epoch: int
    control_endpoint: str
    handoff: HandoffSection
    keys: str | None

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> "ConnectorSettings":
        """Return what `cluster.vllm_engine` wrote; raise on missing or unknown keys."""
        return cls(**{**extra, "handoff": HandoffSection.model_validate(extra["handoff"])})


@dataclass
class PortAddress(KVConnectorHandshakeMetadata):
    """Worker half to scheduler half, once: where this rank's port listens."""

    endpoint: str
    layout: CacheLayout


@dataclass
class Orders(KVConnectorMetadata):
    """Scheduler half to worker halves, with each step.

    What is about blocks to be read is carried out before the step computes; pulls begin when
    vLLM is done with their blocks, which can be after it. `patience_s` is how long a step that
    computes nothing waits for news of the port, None if it computes.
    """

    patience_s: float | None = None
    opened: list[tuple[HandoffId, str]] = field(default_factory=list)
    revoked: list[HandoffId] = field(default_factory=list)
    grown: list[Growth] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    abandoned: list[tuple[HandoffId, str]] = field(default_factory=list)
    drops: list[HandoffId] = field(default_factory=list)
    announced: list[Offer] = field(default_factory=list)
    given_up: list[Offer] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker halves to scheduler half: receipts, failures and awaited first tokens by request,
    port totals by rank. A rank without news is not in it."""

    receipts: dict[str, Receipt]
    failures: dict[str, str]
    tokens: dict[str, int]
    totals: dict[int, dict[str, int]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        """Add another rank's report."""
        assert isinstance(other, WorkerReport)
        for key, theirs in other.receipts.items():
            self.receipts[key] = add_receipt(self.receipts.get(key), theirs)
        self.failures |= other.failures
        self.tokens |= other.tokens
        self.totals |= other.totals
        return self


def add_receipt(ours: Receipt | None, theirs: Receipt) -> Receipt:
    """Add one rank's share of a pull to those before it: bytes add up, the slowest rank's time
    counts."""
    if ours is None:
        return theirs
    return Receipt(
        ours.num_blocks + theirs.num_blocks,
        ours.received_bytes + theirs.received_bytes,
        ours.produced_bytes + theirs.produced_bytes,
        max(ours.transfer_s, theirs.transfer_s),
        "+".join(sorted({*ours.transport.split("+"), *theirs.transport.split("+")} - {""})),
    )
