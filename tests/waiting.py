"""Waiting for a condition with a deadline, instead of sleeping for luck."""

import asyncio
import time
from collections.abc import Awaitable, Callable

_POLL_S = 0.005


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return once `condition()` is true; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout_s} s"
        time.sleep(_POLL_S)


async def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """The same for what this event loop itself brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout_s} s"
        await asyncio.sleep(_POLL_S)


async def eventually(condition: Callable[[], Awaitable[object]], timeout_s: float = 10.0) -> None:
    """Return once `await condition()` is true; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not true after {timeout_s} s"
        await asyncio.sleep(_POLL_S)
