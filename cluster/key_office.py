"""The ring of a deployment whose operator brings none: the controller makes it, keeps it in its
notes, hands it to workers and routers through Ray, and changes it under load.

A change takes three steps (`Keyring`); each is written down first, and the next one waits until
every worker has it. A controller that ends in between is followed by one that goes on there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.controller_store import ControllerStore
from cluster.errors import Unavailable
from cluster.keyring import Keyring, parse_keyring

_NOTE = "keys"
# Step at which a ring stands, and what comes next: nothing under way, added, used.
_NEXT: dict[str, tuple[str, Callable[[Keyring], Keyring]]] = {
    "": ("added", Keyring.with_new),
    "added": ("used", Keyring.using_newest),
    "used": ("", Keyring.without_old),
}

logger = logging.getLogger(__name__)


class KeyOffice:
    """`read` returns the ring in force. `overlap_s` is how long the old pair is still accepted
    after the new one has come into use: routers have long been told by then."""

    def __init__(self, store: ControllerStore, overlap_s: float) -> None:
        self._store = store
        self._overlap_s = overlap_s
        self._changing: asyncio.Task[None] | None = None
        noted: dict[str, Any] | None = store.load(_NOTE)
        if noted is None:
            self._step, self._ring = "", Keyring.generate()
            self._save(self._step, self._ring)
        else:
            self._step, self._ring = noted["step"], parse_keyring(noted["ring"].encode())

    def read(self) -> Keyring:
        return self._ring

    @property
    def is_changing(self) -> bool:
        return self._step != ""

    def rotate(self, hand_out: Callable[[Keyring], Awaitable[None]]) -> None:
        """Begin to replace the ring's pair; raise `Unavailable` while that is under way."""
        if self._changing is not None and not self._changing.done():
            raise Unavailable("the keys are being changed already: wait for the old ones to go")
        self._changing = asyncio.create_task(self._change(hand_out))

    def resume(self, hand_out: Callable[[Keyring], Awaitable[None]]) -> None:
        """Go on with what an earlier controller began, if it did."""
        if self.is_changing and self._changing is None:
            self.rotate(hand_out)

    async def _change(self, hand_out: Callable[[Keyring], Awaitable[None]]) -> None:
        is_begun = self.is_changing
        while not is_begun or self.is_changing:
            if is_begun:
                await hand_out(self._ring)
            if self._step == "used":
                await asyncio.sleep(self._overlap_s)
            is_begun = True
            step, change = _NEXT[self._step]
            ring = change(self._ring)
            # Nobody is told of what a successor would not know.
            await asyncio.to_thread(self._save, step, ring)
            self._step, self._ring = step, ring
            logger.info("keys %s: %s", " ".join(self._ring.names), self._step or "changed")
        await hand_out(self._ring)

    def _save(self, step: str, ring: Keyring) -> None:
        self._store.save(_NOTE, {"step": step, "ring": ring.as_text()})

    def close(self) -> None:
        if self._changing is not None:
            self._changing.cancel()
