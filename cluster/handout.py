"""Gives the office's ring to the actors of workers, and again when it has changed."""

import asyncio
import logging
from typing import Any

import ray

from cluster.key_office import KeyOffice
from cluster.keyring import Keyring

_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class Handout:
    """The actors that were given a ring; without an office there is none to give."""

    def __init__(self, office: KeyOffice | None) -> None:
        self._office = office
        self._actors: list[Any] = []

    def ring_for(self, actor: Any) -> Keyring | None:
        """Return the ring that an actor is to start with; it gets the next ones too."""
        self._actors.append(actor)
        return self._office.read() if self._office is not None else None

    async def include(self, actor: Any) -> None:
        """Take in one that an earlier controller started; its ring may be an older one."""
        ring = self.ring_for(actor)
        if ring is not None:
            await actor.take_keys.remote(ring)

    async def hand_out(self, ring: Keyring) -> None:
        """Return once every worker that is there has the ring."""
        waiting = list(self._actors)
        while waiting:
            has_answered = await asyncio.gather(*(self._give(actor, ring) for actor in waiting))
            waiting = [a for a, is_done in zip(waiting, has_answered, strict=True) if not is_done]

    async def _give(self, actor: Any, ring: Keyring) -> bool:
        """Return whether there is nothing more to do about this actor."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await actor.take_keys.remote(ring)
        except TimeoutError:
            logger.warning("a worker does not answer: the change of keys waits for it")
            return False
        except ray.exceptions.RayError as error:
            logger.info("a worker has gone: %s", error)
            self._actors = [each for each in self._actors if each is not actor]
        return True
