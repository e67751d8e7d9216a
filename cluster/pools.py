"""What the autoscaler asks of whoever runs the pools; the controller fills it."""

from collections.abc import Mapping
from typing import Protocol

from cluster.load import ClusterLoad
from cluster.names import Role


class Pools(Protocol):
    """Both pools as one thing that can be looked at and resized; calls return at once."""

    def load(self) -> ClusterLoad:
        """Return what every worker and router reported last."""
        ...

    def resize(self, sizes: Mapping[Role, int], reason: str) -> None:
        """Keep this many workers in each pool from now on; the same sizes again change nothing."""
        ...

    def now(self) -> float:
        """Return Unix time in seconds."""
        ...
