"""A timer that keeps time to a tenth of a millisecond: event loops' own count whole ones."""

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_SOONEST_S = 1e-6

_libc = ctypes.CDLL(None, use_errno=True)


class PreciseTimer:
    """Calls `fire` at a moment of `time.monotonic`: the kernel wakes the loop, nothing spins.

    One moment at a time: `arm` replaces the last one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fire: Callable[[], None]) -> None:
        self._loop = loop
        self._fire = fire
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._fd, self._expired)

    def arm(self, at_s: float) -> None:
        """Fire at `at_s`, at once if that is past."""
        seconds, rest = divmod(max(_SOONEST_S, at_s), 1.0)
        # struct itimerspec: the interval, then the first expiry, each in seconds and nanoseconds.
        setting = struct.pack("@llll", 0, 0, int(seconds), int(rest * 1e9))
        if _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, setting, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # armed again since it fired
        self._fire()
