"""Leases by duration: the oldest is always first, so finding the expired is O(expired)."""

from collections import OrderedDict
from collections.abc import Iterator

from cluster.names import HandoffId


class LeaseTable:
    """Hand-offs and when they were last wanted; every lease lasts `duration_s`."""

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self._since: OrderedDict[HandoffId, float] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LeaseTable {len(self._since)} leases of {self.duration_s} s>"

    def __len__(self) -> int:
        return len(self._since)

    def touch(self, handoff_id: HandoffId, now: float) -> None:
        """Grant or renew a lease; `now` must not go backwards."""
        self._since[handoff_id] = now
        self._since.move_to_end(handoff_id)

    def end(self, handoff_id: HandoffId) -> None:
        """Forget a lease; one that is not there is no error."""
        self._since.pop(handoff_id, None)

    def take_expired(self, now: float) -> Iterator[HandoffId]:
        """Remove and yield the leases that have run out."""
        while self._since:
            handoff_id, since = next(iter(self._since.items()))
            if now - since < self.duration_s:
                return
            del self._since[handoff_id]
            yield handoff_id
