"""Every decision with what it rested on, so that it can be read, paged through and replayed."""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from autoscaler.decision import Decision, PolicyState
from autoscaler.decision_file import DecisionFile
from autoscaler.signals import Snapshot
from cluster.autoscaler_config import AutoscalerSection


@dataclass(frozen=True, slots=True)
class Record:
    """One decision; `state` is the policy's before it."""

    seq: int
    now: float
    snapshot: Snapshot
    state: PolicyState
    decision: Decision

    def as_document(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "now": self.now,
            "snapshot": self.snapshot.as_document(),
            "state": self.state.as_document(),
            "decision": self.decision.as_document(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        return cls(
            seq=int(document["seq"]),
            now=float(document["now"]),
            snapshot=Snapshot.from_document(document["snapshot"]),
            state=PolicyState.from_document(document["state"]),
            decision=Decision.from_document(document["decision"]),
        )


def canonical_json(document: Mapping[str, Any]) -> str:
    """Return the one way to write a document on one line; equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


class DecisionLog:
    """The last decisions in memory, and all of them in a file where one is named."""

    def __init__(self, limit: int, path: Path | None = None, next_seq: int = 1) -> None:
        self.next_seq = next_seq
        self._records: deque[Record] = deque(maxlen=limit)
        self._file = None if path is None else DecisionFile(path)
        self._settings: AutoscalerSection | None = None

    @property
    def num_unwritten(self) -> int:
        """How many decisions the file should hold and does not."""
        return 0 if self._file is None else self._file.num_unwritten

    def append(
        self,
        config: AutoscalerSection,
        snapshot: Snapshot,
        state: PolicyState,
        decision: Decision,
    ) -> Record:
        """Keep a decision, with the state from before it and the settings it was made under."""
        record = Record(self.next_seq, decision.now, snapshot, state, decision)
        self.next_seq += 1
        self._records.append(record)
        if self._file is not None:
            self._write(self._file, config, record)
        return record

    def restore(self, records: Iterable[Record]) -> None:
        """Take over records of an earlier life; the file has them already."""
        for record in records:
            self._records.append(record)
            self.next_seq = max(self.next_seq, record.seq + 1)

    def page(self, after: int = 0, limit: int = 100) -> list[Record]:
        """Return up to `limit` records that follow `after`, oldest first."""
        return [record for record in self._records if record.seq > after][:limit]

    def last(self, count: int) -> list[Record]:
        """Return the last `count` records, oldest first."""
        return list(self._records)[-count:] if count > 0 else []

    def _write(self, file: DecisionFile, config: AutoscalerSection, record: Record) -> None:
        """Write the record; before it the settings, where the file does not have these yet."""
        lines = [canonical_json(record.as_document())]
        if config != self._settings or file.is_new():
            lines.insert(0, canonical_json({"settings": config.model_dump(mode="json")}))
        if file.write(lines):
            self._settings = config
