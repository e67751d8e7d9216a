"""Why an engine's processes ended, out of what they wrote.

vLLM's front process says no more than "see root cause above": the cause is in the output of the
processes below it. Theirs goes where this process's own goes, under Ray into files of the
session's log folder; what was written there since is read from them.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress

_STREAMS = (1, 2)
# An engine that fails writes a few tracebacks.
_MOST_BYTES = 1 << 20
_MOST_CHARACTERS = 500
# What vLLM puts before each line of a process, and of a log record.
_PREFIX = re.compile(r"^\([^()]* pid=\d+\) ?|^[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit): \S")


class LastWords:
    """What is written to this process's output from now on, its children's included."""

    def __init__(self) -> None:
        self._begins = {stream: _size(stream) for stream in _STREAMS}

    def text(self) -> str:
        """Return it, the error stream last; empty where output does not go into files."""
        return "".join(
            _read(stream, begin) for stream, begin in self._begins.items() if begin is not None
        )

    def cause(self) -> str | None:
        return cause_in(self.text())


def points_elsewhere(reason: str) -> bool:
    """Return whether who says so knows nothing itself."""
    return "root cause" in reason


def cause_in(text: str) -> str | None:
    """Return the last exception that names a cause; else the last line; None if there is none."""
    lines = list(_lines(text))
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    causes = [line for line in exceptions if not points_elsewhere(line)]
    said = causes or exceptions or lines
    return said[-1][:_MOST_CHARACTERS] if said else None


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        bare = line.strip()
        while (shorter := _PREFIX.sub("", bare, count=1)) != bare:
            bare = shorter
        if bare:
            yield bare


def _size(stream: int) -> int | None:
    """Return the length of the file behind the stream, None if there is none."""
    with suppress(OSError):
        found = os.fstat(stream)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    return None


def _read(stream: int, begin: int) -> str:
    """Return the end of what the stream's file has after `begin`."""
    # Opened anew: the stream itself is for writing only.
    with suppress(OSError), open(f"/proc/self/fd/{stream}", "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - _MOST_BYTES))
        return file.read().decode(errors="replace")
    return ""
