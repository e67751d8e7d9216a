"""The parcels a producer has staged and not got back: whose they are, and since when.

Each belongs to one hand-off and goes back when its consumer has taken it, when the hand-off is
over, or when it has been out longer than any consumer waits: a dead one holds none for good.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.names import HandoffId
from kv_transfer.protocol import Place, Via
from kv_transfer.transport import Stage, Transport


@dataclass(frozen=True, slots=True)
class _Out:
    via: Via
    handoff_id: HandoffId
    since: float


class Parcels:
    """Stages chunks over the first way that works, and keeps book of what is out."""

    def __init__(self, transports: Mapping[Via, Transport], timeout_s: float) -> None:
        self._transports = transports
        self._timeout_s = timeout_s
        self._out: OrderedDict[int, _Out] = OrderedDict()
        self._of: dict[HandoffId, set[int]] = {}

    def __len__(self) -> int:
        return len(self._out)

    def places(self, vias: Iterable[Via]) -> tuple[Place, ...]:
        """Return where the wanted transports, as far as they exist here, are found."""
        found = []
        for via in vias:
            if (transport := self._transports.get(via)) is None:
                continue
            try:
                found.append(Place(via, transport.address()))
            except OSError:
                # No shared memory here: the next way is for such hosts.
                continue
        return tuple(found)

    def stage(
        self, ways: Iterable[Place], num_bytes: int, handoff_id: HandoffId, now: float
    ) -> tuple[Via, Stage] | None:
        """Return memory for a chunk over the first of `ways` that has room, and which it is."""
        for way in ways:
            stage = self._transports[way.via].stage(num_bytes, way.address)
            if stage is not None:
                if stage.parcel:
                    self._out[stage.parcel] = _Out(way.via, handoff_id, now)
                    self._of.setdefault(handoff_id, set()).add(stage.parcel)
                return way.via, stage
        return None

    def usable(self, ways: Iterable[Place], num_bytes: int, is_held: bool) -> list[Place]:
        """Return those of `ways` that exist here and can carry such a chunk.

        Where it is not held the engine may take the blocks back, and they have to be copied.
        """
        return [
            way
            for way in ways
            if way.via in self._transports
            and (is_held or not way.via.is_in_place)
            and self._transports[way.via].can_carry(num_bytes, way.address)
        ]

    def take_back(self, handoff_id: HandoffId, parcels: Iterable[int]) -> None:
        """The hand-off's consumer has read these; parcels of others are not its to return."""
        for parcel in self._of.get(handoff_id, set()).intersection(parcels):
            self._free(parcel)

    def end(self, handoff_id: HandoffId) -> None:
        """The hand-off is over: whatever it still has out comes back."""
        for parcel in self._of.get(handoff_id, set()).copy():
            self._free(parcel)

    def expire(self, now: float) -> int:
        """Take back what nobody has taken in time; return how many."""
        num_before = len(self._out)
        while self._out:
            parcel, out = next(iter(self._out.items()))
            if now - out.since < self._timeout_s:
                break
            self._free(parcel)
        return num_before - len(self._out)

    def _free(self, parcel: int) -> None:
        out = self._out.pop(parcel)
        self._transports[out.via].free(parcel)
        parcels = self._of[out.handoff_id]
        parcels.discard(parcel)
        if not parcels:
            del self._of[out.handoff_id]
