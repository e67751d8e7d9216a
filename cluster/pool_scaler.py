"""What the controller asks of whoever sizes the pools; `autoscaler.loop.Autoscaler` fills it."""

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from cluster.config import TandemConfig
from cluster.names import Role


class PoolScaler(Protocol):
    """Decides the sizes of both pools, by load or by order."""

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
