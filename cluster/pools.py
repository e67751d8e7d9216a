"""Between the controller, which runs the pools, and the autoscaler, which sizes them."""

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from cluster.config import TandemConfig
from cluster.load import ClusterLoad
from cluster.names import Role


class Pools(Protocol):
    """Both pools as one thing that can be looked at and resized; calls return at once. The
    controller fills it."""

    def load(self) -> ClusterLoad:
        """Return what every worker and router reported last."""
        ...

    def resize(self, sizes: Mapping[Role, int], reason: str) -> None:
        """Keep this many workers in each pool from now on; the same sizes again change nothing."""
        ...

    def now(self) -> float:
        """Return Unix time in seconds."""
        ...


class PoolScaler(Protocol):
    """What sizes the pools; `autoscaler.loop.Autoscaler` fills it."""

    async def run(self) -> None: ...

    def pin(self, sizes: Mapping[Role, int], reason: str) -> None: ...

    def unpin(self) -> None: ...

    def reconfigure(self, config: TandemConfig, sizes: Mapping[Role, int], reason: str) -> None: ...

    def tick(self) -> object:
        """Look at the load and decide if it is time to, or an order has come."""
        ...

    def decisions(self, after: int, limit: int) -> list[dict[str, Any]]: ...

    def signals(self) -> Mapping[str, float]:
        """Return what is measured now, by name; what is not known is left out."""
        ...

    def view(self) -> dict[str, Any]:
        """Return the signal beside what it is held against, JSON-able."""
        ...

    @property
    def pinned(self) -> list[int] | None:
        """The sizes ordered by hand, (P, D), if there are any."""
        ...

    @property
    def num_unwritten(self) -> int:
        """How many decisions the decision file lacks."""
        ...

    @property
    def revision(self) -> Hashable: ...

    def document(self) -> dict[str, Any]: ...
