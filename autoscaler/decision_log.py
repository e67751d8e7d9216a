"""Every decision with what it rested on, so that it can be read, paged through and replayed."""

import json
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from autoscaler.decision import Decision, PolicyState
from autoscaler.policy import decide
from autoscaler.signals import Snapshot
from cluster.autoscaler_config import AutoscalerSection

_log = logging.getLogger(__name__)


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


def parse_records(text: str) -> list[Record]:
    """Return the records of a decision file; raise `ValueError` naming the line that is none.

    A last line without its newline is a write that was cut off and is left out.
    """
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            records.append(Record.from_document(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} is no decision record: {error!r}") from None
    return records


def replay(records: Iterable[Record], config: AutoscalerSection) -> list[Decision]:
    """Return each decision again from its own record: the same bytes under the same `config`."""
    return [decide(config, each.state, each.snapshot, each.now)[0] for each in records]


def rerun(records: Sequence[Record], config: AutoscalerSection) -> list[Decision]:
    """Return what the policy would have decided had it run with `config` from the first record.

    Its own decisions carry over from record to record, orders by hand are the recorded ones.
    """
    decisions = []
    state = records[0].state if records else None
    for record in records:
        assert state is not None
        pinned = replace(state, pin=record.state.pin)
        decision, state = decide(config, pinned, record.snapshot, record.now)
        decisions.append(decision)
    return decisions


class DecisionLog:
    """The last decisions in memory, and all of them in a file where one is named."""

    def __init__(self, limit: int, path: Path | None = None, next_seq: int = 1) -> None:
        self.next_seq = next_seq
        self._records: deque[Record] = deque(maxlen=limit)
        self._path = path

    def append(self, snapshot: Snapshot, state: PolicyState, decision: Decision) -> Record:
        """Keep a decision, with the state from before it."""
        record = Record(self.next_seq, decision.now, snapshot, state, decision)
        self.next_seq += 1
        self._records.append(record)
        if self._path is not None:
            self._write(self._path, record)
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

    def _write(self, path: Path, record: Record) -> None:
        # A full disk must not stop the scaling; the decision is still in memory.
        try:
            with path.open("a") as file:
                file.write(canonical_json(record.as_document()) + "\n")
        except OSError as error:
            _log.warning("decision %d is not in %s: %s", record.seq, path, error)
