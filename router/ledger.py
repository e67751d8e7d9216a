"""What this router has reserved on every worker: counts kept as reservations come and go. Pure.

A reservation holds one decode stream from placement to the end of the request, and on the
prefill side two different things one after the other: while the prompt is computed it takes a
place among the prompts in flight, and from then until decode has pulled the blocks it holds
memory but no compute. They are counted apart because they are bounded by different things: a
worker that holds many finished prompts can still compute the next one.

Decode's memory is promised with the placement, and counted here until a report of the worker can
show it: some time after decode was asked, when its engine has taken the blocks or waits for them.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass, fields

from cluster.names import WorkerId
from router.policy import Placed


class LedgerError(RuntimeError):
    """A reservation was released twice or a count is wrong: a bug of ours, never a client's."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What is reserved on one worker: prompts in flight, prompts held for decode, streams."""

    num_prefills: int = 0
    prefill_tokens: int = 0
    num_held: int = 0
    held_tokens: int = 0
    num_streams: int = 0


_IDLE = WorkerLoad()
# A report that comes this long after decode was asked, in seconds, has the blocks it has taken.
REPORTED_AFTER_S = 0.5


class _PrefillSide(enum.Enum):
    COMPUTING = enum.auto()
    HELD = enum.auto()
    DONE = enum.auto()


class Reservation:
    """One placement's share of the ledger; only the ledger changes it."""

    __slots__ = ("is_open", "placement", "side")

    def __init__(self, placement: Placed) -> None:
        self.placement = placement
        self.is_open = True
        has_prefill = placement.prefill_worker is not None
        self.side = _PrefillSide.COMPUTING if has_prefill else _PrefillSide.DONE

    def loads(self) -> Iterable[tuple[WorkerId, WorkerLoad]]:
        """Yield what it takes on each worker."""
        placement, tokens = self.placement, self.placement.num_prompt_tokens
        yield placement.decode_worker, WorkerLoad(num_streams=1)
        if placement.prefill_worker is None:
            return
        if self.side is _PrefillSide.COMPUTING:
            yield placement.prefill_worker, WorkerLoad(num_prefills=1, prefill_tokens=tokens)
        elif self.side is _PrefillSide.HELD:
            yield placement.prefill_worker, WorkerLoad(num_held=1, held_tokens=tokens)


class Ledger:
    """The router's open reservations, summed by worker."""

    def __init__(self) -> None:
        self._loads: dict[WorkerId, WorkerLoad] = {}
        self._open: set[Reservation] = set()
        # By decode worker: when it was asked for each, None before that.
        self._promised: dict[WorkerId, dict[Reservation, float | None]] = {}

    def __repr__(self) -> str:
        workers = "".join(
            f" {worker_id}:{load.num_prefills}p/{load.num_held}h/{load.num_streams}s"
            for worker_id, load in sorted(self._loads.items())
        )
        return f"<Ledger open={len(self._open)}{workers}>"

    @property
    def num_open(self) -> int:
        return len(self._open)

    def load(self, worker_id: WorkerId) -> WorkerLoad:
        return self._loads.get(worker_id, _IDLE)

    def reserve(self, placement: Placed) -> Reservation:
        reservation = Reservation(placement)
        self._open.add(reservation)
        self._promised.setdefault(placement.decode_worker, {})[reservation] = None
        self._add(reservation, 1)
        return reservation

    def ask_decode(self, reservation: Reservation, now: float) -> None:
        """Decode's engine takes the blocks from here on."""
        self._check_open(reservation)
        promised = self._promised.get(reservation.placement.decode_worker, {})
        if reservation in promised:
            promised[reservation] = now

    def promised_tokens(self, worker_id: WorkerId, reported_s: float) -> list[int]:
        """Return the lengths of prompts for which a report of that moment had no blocks yet."""
        promised = self._promised.get(worker_id, {})
        for reservation, asked_s in list(promised.items()):
            if asked_s is not None and asked_s + REPORTED_AFTER_S <= reported_s:
                self._keep_promise(reservation)
        return [reservation.placement.num_prompt_tokens for reservation in promised]

    def end_prefill(self, reservation: Reservation) -> None:
        """The prompt is computed: its place is free, its blocks are held."""
        self._turn(reservation, _PrefillSide.COMPUTING, _PrefillSide.HELD)

    def end_handoff(self, reservation: Reservation) -> None:
        """Decode has the KV cache: nothing is left on the prefill worker."""
        self._turn(reservation, _PrefillSide.HELD, _PrefillSide.DONE)

    def release(self, reservation: Reservation) -> None:
        """Give back all that is left of it; raise `LedgerError` the second time."""
        self._check_open(reservation)
        self._add(reservation, -1)
        reservation.is_open = False
        self._open.remove(reservation)
        self._keep_promise(reservation)

    def check_invariants(self) -> None:
        """Raise `LedgerError` unless the counts are the sum of the open reservations."""
        sums = Ledger()
        for reservation in self._open:
            sums._add(reservation, 1)
        if sums._loads != self._loads:
            raise LedgerError(f"{self!r} should be {sums!r}")
        promised = [one for each in self._promised.values() for one in each]
        if not self._open.issuperset(promised):
            raise LedgerError(f"{self!r}: memory is promised to requests that are gone")

    def _turn(self, reservation: Reservation, old: _PrefillSide, new: _PrefillSide) -> None:
        self._check_open(reservation)
        if reservation.side is not old:
            raise LedgerError(f"prefill side is {reservation.side.name}, not {old.name}")
        self._add(reservation, -1)
        reservation.side = new
        self._add(reservation, 1)

    def _keep_promise(self, reservation: Reservation) -> None:
        worker_id = reservation.placement.decode_worker
        promised = self._promised.get(worker_id, {})
        promised.pop(reservation, None)
        if not promised:
            self._promised.pop(worker_id, None)

    def _check_open(self, reservation: Reservation) -> None:
        if reservation not in self._open:
            raise LedgerError(f"not an open reservation: {reservation.placement}")

    def _add(self, reservation: Reservation, sign: int) -> None:
        for worker_id, share in reservation.loads():
            changed = _sum(self.load(worker_id), share, sign)
            if changed == _IDLE:
                # Worker ids come and go with the pools; idle ones must not pile up.
                self._loads.pop(worker_id, None)
            else:
                self._loads[worker_id] = changed


def _sum(load: WorkerLoad, share: WorkerLoad, sign: int) -> WorkerLoad:
    counts = {
        field.name: getattr(load, field.name) + sign * getattr(share, field.name)
        for field in fields(WorkerLoad)
    }
    if min(counts.values()) < 0:
        raise LedgerError(f"{load} has less than {share}")
    return WorkerLoad(**counts)
