"""Which workers there are and which of them answer: a link for each the controller lists.

Routers keep serving from the last list if the controller is down. A worker that is no longer
listed takes nothing more, but its link stays until its last leg has ended: it may be draining.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.errors import WorkerLost
from cluster.link_renewal import LinkRenewal
from cluster.messages import Holder
from cluster.names import Role, RouterId, WorkerId
from cluster.request_plane import WorkerLink
from cluster.snapshot import ReadyWorker, WorkerEntry
from cluster.sockets import Sockets


@dataclass(slots=True)
class _Member:
    entry: WorkerEntry
    link: WorkerLink

    def state(self) -> str:
        """Return `ready`, or why it is not.

        A link is ready once the listed worker, in the listed role and life, has answered on it:
        another process may have come to listen on its port, or a role flip be under way.
        """
        snapshot, entry = self.link.snapshot, self.entry
        if self.link.is_lost:
            return "lost"
        if snapshot is None:
            return "connecting"
        answers = (snapshot.worker_id, snapshot.role, snapshot.epoch)
        return "ready" if answers == (entry.worker_id, entry.role, entry.epoch) else "mismatched"

    def is_same_life(self, entry: WorkerEntry) -> bool:
        return (self.entry.epoch, self.entry.endpoint) == (entry.epoch, entry.endpoint)

    def as_document(self) -> dict[str, object]:
        snapshot = self.link.snapshot
        return {
            **self.entry.as_document(),
            "state": self.state(),
            "legs": self.link.num_legs,
            "running": snapshot and snapshot.num_running,
            "waiting": snapshot and snapshot.num_waiting,
            "blocks": snapshot and snapshot.num_blocks,
            "free_blocks": snapshot and snapshot.num_free_blocks,
            "held_blocks": snapshot and snapshot.num_held_blocks,
            "holders": [_describe(each) for each in snapshot.holders] if snapshot else [],
        }


def _describe(holder: Holder) -> dict[str, object]:
    return {
        "handoff_id": holder.handoff_id,
        "blocks": holder.num_blocks,
        "held_s": round(holder.held_s, 3),
    }


class Membership:
    """One router's links by worker id."""

    def __init__(self, sockets: Sockets, router_id: RouterId, timeout_s: float) -> None:
        self.router_id = router_id
        self._sockets = sockets
        self._renewal = LinkRenewal(sockets)
        self._timeout_s = timeout_s
        self._members: dict[WorkerId, _Member] = {}
        self._leaving: dict[WorkerId, _Member] = {}
        self._watchers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        states = "".join(f" {name}:{member.state()}" for name, member in self._members.items())
        return f"<Membership leaving={len(self._leaving)}{states}>"

    def subscribe(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` whenever more workers may be ready, or fewer, or have more room."""
        self._watchers.append(on_change)

    async def update(self, entries: Iterable[WorkerEntry]) -> None:
        """Take over the controller's list: open, keep and retire links.

        Everything visible changes before the first await; only closing takes time. Call it with
        an unchanged list too: that is when retired links without legs are closed.
        """
        listed = {entry.worker_id: entry for entry in entries}
        for worker_id in self._members.keys() - listed.keys():
            self._leaving[worker_id] = self._members.pop(worker_id)
        over = [self._adopt(entry) for entry in listed.values()]
        for known in self._members.values():
            known.link = self._renewal.turn(known.link)
        over += [
            self._leaving.pop(worker_id)
            for worker_id, member in list(self._leaving.items())
            if member.link.num_legs == 0 or member.link.is_lost
        ]
        self._notify()
        for member in over:
            if member is not None:
                await self._renewal.end(member.link)
        await self._renewal.close_drained()

    def ready(self, role: Role) -> list[WorkerLink]:
        """Return the links of the workers in `role` that answer."""
        return [
            member.link
            for member in self._members.values()
            if member.entry.role is role and member.state() == "ready"
        ]

    def ready_workers(self) -> list[ReadyWorker]:
        """Return the workers that answer, with what they report."""
        return [
            ReadyWorker(
                member.entry,
                snapshot.num_waiting,
                snapshot.block_size,
                snapshot.num_blocks,
                snapshot.num_free_blocks,
                member.link.snapshot_s,
            )
            for member in self._members.values()
            if (snapshot := member.link.snapshot) is not None and member.state() == "ready"
        ]

    def link(self, worker_id: WorkerId) -> WorkerLink:
        """Return the worker's link; raise `WorkerLost` if it is no longer listed."""
        member = self._members.get(worker_id)
        if member is None:
            raise WorkerLost(f"worker {worker_id} has left")
        return member.link

    def report(self) -> list[dict[str, object]]:
        """Return a document for each worker, those on their way out last."""
        leaving = [
            {**member.as_document(), "state": "leaving"} for member in self._leaving.values()
        ]
        return [member.as_document() for member in self._members.values()] + leaving

    async def close(self) -> None:
        members = [*self._members.values(), *self._leaving.values()]
        self._members.clear()
        self._leaving.clear()
        self._notify()
        for member in members:
            await member.link.close()
        await self._renewal.close()

    def _adopt(self, entry: WorkerEntry) -> _Member | None:
        """Make `entry` a member; return the one that it replaces, if any."""
        known = self._members.get(entry.worker_id) or self._leaving.pop(entry.worker_id, None)
        if known is not None and known.is_same_life(entry):
            known.entry = entry
            self._members[entry.worker_id] = known
            return None
        link = WorkerLink(
            self._sockets,
            self.router_id,
            entry.worker_id,
            entry.endpoint,
            self._timeout_s,
            on_change=self._notify,
            on_room=self._notify,
        )
        self._members[entry.worker_id] = _Member(entry, link)
        return known

    def _notify(self) -> None:
        for on_change in self._watchers:
            on_change()
