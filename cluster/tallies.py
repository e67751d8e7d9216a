"""What the two ends of a link conclude from their counts. Pure.

A connection that breaks and that ZeroMQ repairs loses what was on it, and nobody is told. So each
end counts what it sends and what comes, and with every heartbeat the counts are compared: what was
sent before less what has come is always the same, unless something was lost.
"""

from dataclasses import dataclass

from cluster.messages import Tally


@dataclass(slots=True)
class Traffic:
    """Messages that came and went, but for heartbeats and what answers them."""

    num_received: int = 0
    num_sent: int = 0


class TallyReader:
    """The tallies that come over one link, each held against the one before."""

    def __init__(self) -> None:
        self._last: Tally | None = None
        self._missing = (0, 0)

    def read(self, tally: Tally, num_received: int) -> range | None:
        """Return which of the link's messages begin a request that may have lost something, by
        the order in which they were sent, from 1; None if nothing was lost.

        `num_received` is how many of the worker's messages have come before this tally. What was
        sent after the heartbeat that it answers came by the repaired connection.
        """
        missing = tally.num_asked - tally.num_received, tally.num_answers - num_received
        last, known = self._last, self._missing
        self._last, self._missing = tally, missing
        if last is None or missing == known:
            return None
        # The same process that has forgotten the link, or another one.
        counts_afresh = tally.num_received < last.num_received
        if counts_afresh or missing[1] != known[1]:
            return range(1, tally.num_asked + 1)
        # All that was said to it before the last tally had come.
        return range(last.num_asked + 1, tally.num_asked + 1)
