"""Whether blocks have leaked: taken, though nobody has a request open or a KV cache held. Pure.

Under load that cannot be told from outside the engine: what one request gives back the next one
takes. At rest it can, once what ends late (a cancelled pull, an abort of the last step) has had
its time. What a prefix cache keeps counts as free in every engine.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class LeakWatch:
    """Told the engine's load again and again; `num_leaked` is what the last rest has shown.

    A worker is at rest once it has been idle, with the same number of blocks taken, for
    `settle_s`; times in seconds of any clock that does not go back.
    """

    settle_s: float
    num_leaked: int = 0
    _num_taken: int = 0
    _since: float | None = None

    def observe(self, num_taken: int, is_idle: bool, now: float) -> int:
        """Return how many blocks have leaked, as far as is known now."""
        if not is_idle:
            self._since = None
        elif self._since is None or num_taken != self._num_taken:
            self._since, self._num_taken = now, num_taken
        elif now - self._since >= self.settle_s:
            self.num_leaked = num_taken
        # Whatever was thought before: no more can have leaked than is taken.
        self.num_leaked = min(self.num_leaked, num_taken)
        return self.num_leaked
