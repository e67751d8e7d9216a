"""Who is served next: choosing and reserving in one step, and the line of those without room. Pure.

The line is strict: requests are decided again in the order they arrived, whenever room is given
back or the pools change, and none overtakes. A request that is tried again keeps its place. The
one exception is a request that may not use some workers: it does not hold up those behind it
that may, and loses nothing by that, being asked first every time.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from cluster.config import RouterSection
from cluster.names import Role
from cluster.snapshot import ReadyWorker
from router.ledger import Ledger, Reservation
from router.policy import (
    Placed,
    PlacementRequest,
    PoolSnapshot,
    Queued,
    RejectedPlacement,
    WorkerView,
    choose_placement,
    num_blocks_of,
)


class Ticket:
    """A request's place in line until `answer` is set, and from then on its reservation."""

    __slots__ = ("answer", "order", "request", "wake")

    def __init__(self, request: PlacementRequest, order: int, wake: Callable[[], None]) -> None:
        self.request = request
        self.order = order
        self.wake = wake
        self.answer: Reservation | RejectedPlacement | None = None


class Admission:
    """The ledger and the line in front of it.

    `ready_workers` is asked at every decision, so that a placement is always on workers that are
    ready at that moment.
    """

    def __init__(
        self,
        config: RouterSection,
        ready_workers: Callable[[], Sequence[ReadyWorker]],
        rng: Random | None = None,
    ) -> None:
        self.ledger = Ledger()
        self._config = config
        self._ready_workers = ready_workers
        self._rng = rng
        self._waiting: list[Ticket] = []
        self._orders = itertools.count()

    def __repr__(self) -> str:
        return f"<Admission waiting={len(self._waiting)} {self.ledger!r}>"

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next_order(self) -> int:
        """Return the place in line of a request that arrives at this moment."""
        return next(self._orders)

    def enter(
        self, request: PlacementRequest, order: int, wake: Callable[[], None] = lambda: None
    ) -> Ticket:
        """Decide, or stand in line; `wake` is called once if the answer comes later.

        `wake` must not come back into the admission.
        """
        ticket = Ticket(request, order, wake)
        if self._place(ticket, self._is_behind(order)):
            ticket.request = replace(request, is_admitted=True)
            insort(self._waiting, ticket, key=_order)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up the place in line or the reservation, whichever it is; once per ticket."""
        if isinstance(ticket.answer, Reservation):
            self.ledger.release(ticket.answer)
            self.redecide()
        elif ticket.answer is None:
            del self._waiting[bisect_left(self._waiting, ticket.order, key=_order)]
            # Those behind it may have waited for it alone.
            self.redecide()

    def end_prefill(self, reservation: Reservation) -> None:
        """The prompt is computed; the next one may start."""
        self.ledger.end_prefill(reservation)
        self.redecide()

    def redecide(self) -> None:
        """Decide those in line again, first come first served, up to the first without room."""
        index = 0
        while index < len(self._waiting):
            ticket = self._waiting[index]
            if not self._place(ticket, is_behind=False):
                del self._waiting[index]
                ticket.wake()
            elif ticket.request.excluded:
                index += 1
            else:
                return

    def check_invariants(self) -> None:
        """Raise unless the ledger adds up and the line is in order, of the undecided alone."""
        self.ledger.check_invariants()
        orders = [ticket.order for ticket in self._waiting]
        if orders != sorted(set(orders)) or any(ticket.answer for ticket in self._waiting):
            raise RuntimeError(f"{self!r}: line is {orders}")

    def _place(self, ticket: Ticket, is_behind: bool) -> bool:
        """Choose and reserve, with nothing in between; return whether the ticket must wait."""
        decision = choose_placement(
            self._snapshot(is_behind), ticket.request, self._config, self._rng
        )
        if isinstance(decision, Queued):
            return True
        if isinstance(decision, Placed):
            ticket.answer = self.ledger.reserve(decision)
        else:
            ticket.answer = decision
        return False

    def _is_behind(self, order: int) -> bool:
        for ticket in self._waiting:
            if ticket.order > order:
                return False
            if not ticket.request.excluded:
                return True
        return False

    def _snapshot(self, is_behind: bool) -> PoolSnapshot:
        pools: dict[Role, list[WorkerView]] = {Role.PREFILL: [], Role.DECODE: []}
        for worker in self._ready_workers():
            pools[worker.entry.role].append(self._view(worker))
        prefill, decode = tuple(pools[Role.PREFILL]), tuple(pools[Role.DECODE])
        return PoolSnapshot(prefill, decode, len(self._waiting), is_behind)

    def _view(self, worker: ReadyWorker) -> WorkerView:
        entry = worker.entry
        load = self.ledger.load(entry.worker_id)
        is_prefill = entry.role is Role.PREFILL
        num_reserved = load.num_prefills if is_prefill else load.num_streams
        size, room = worker.block_size, worker.num_free_blocks
        if not is_prefill:
            promised = self.ledger.promised_tokens(entry.worker_id, worker.reported_s)
            room -= sum(num_blocks_of(num_tokens, size) for num_tokens in promised)
        return WorkerView(
            entry.worker_id,
            entry.domain,
            num_reserved,
            load.prefill_tokens,
            worker.num_waiting,
            size,
            worker.num_blocks,
            room,
            entry.layout.fingerprint,
        )


def _order(ticket: Ticket) -> int:
    return ticket.order
