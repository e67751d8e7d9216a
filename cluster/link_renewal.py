"""Links to workers outlive a change of keys: a new one is made beside the old one, and used once
it answers; the old one goes when its last request has ended. No moment is without a link."""

from cluster.request_plane import WorkerLink
from cluster.sockets import Sockets


class LinkRenewal:
    """Successors of the links of one process, by the link that they will replace."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._successors: dict[WorkerLink, WorkerLink] = {}
        self._retired: list[WorkerLink] = []

    def turn(self, link: WorkerLink) -> WorkerLink:
        """Return the link to use from now on: `link`, or its successor if that has answered."""
        key = self._sockets.key
        if link.key == key:
            return link
        successor = self._successors.get(link)
        if successor is None or successor.key != key:
            if successor is not None:
                self._retired.append(successor)
            successor = self._successors[link] = link.renewed()
        if successor.snapshot is None:
            return link
        del self._successors[link]
        self._retired.append(link)
        return successor

    async def end(self, link: WorkerLink) -> None:
        """Close a link, and what was to replace it."""
        if (successor := self._successors.pop(link, None)) is not None:
            await successor.close()
        await link.close()

    async def close_drained(self) -> None:
        """Close the links that were replaced and have no request open."""
        drained = [link for link in self._retired if link.num_legs == 0 or link.is_lost]
        self._retired = [link for link in self._retired if link not in drained]
        for link in drained:
            await link.close()

    async def close(self) -> None:
        for link in [*self._successors.values(), *self._retired]:
            await link.close()
        self._successors.clear()
        self._retired.clear()
