"""How the operator ends a launcher: SIGINT, SIGTERM and SIGHUP become one exception."""

import signal
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The operator asked this process to end; raised in the main thread, wherever it is."""


def catch() -> None:
    """Raise `Interrupted` on the signals. Call again after `ray.init`, which takes SIGTERM:
    its handler prints a stack and lets the process die with everything still running."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Once: a second one would break up what unwinds from the first.
        ignore()
        raise Interrupted

    for number in _NUMBERS:
        signal.signal(number, interrupt)


def ignore() -> None:
    """Stopping takes seconds and must not be cut short by an impatient second Ctrl-C."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
