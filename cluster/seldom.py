"""For what may happen thousands of times a second and is to be said once in a while."""

import time


class Seldom:
    """Is due at first, and then not again for `period_s`."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next_s = 0.0

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + self._period_s
        return True
