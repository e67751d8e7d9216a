"""The file that decisions are appended to: a full disk costs lines, never the loop or a line
that was written."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger(__name__)


class DecisionFile:
    """Appends lines to `path`. A write that fails is counted; the first one in a row is logged.

    A line that was torn, by a full disk or by the end of an earlier process, stays a line of its
    own: the next write ends it first.
    """

    def __init__(self, path: Path) -> None:
        self.num_unwritten = 0
        self._path = path
        self._is_failing = False
        # How an earlier process ended is not known.
        self._may_be_torn = True

    def write(self, lines: Sequence[str]) -> bool:
        """Append the lines, the last of which is a decision; return whether they are there."""
        try:
            self._append("".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            self.num_unwritten += 1
            self._may_be_torn = True
            if not self._is_failing:
                _log.warning("decisions are not in %s from now on: %s", self._path, error)
            self._is_failing = True
            return False
        if self._is_failing:
            _log.warning("%s: written again; %d lack by now", self._path, self.num_unwritten)
        self._is_failing = self._may_be_torn = False
        return True

    def is_new(self) -> bool:
        """Return whether nothing is in the file: it may have been rotated away."""
        try:
            return self._path.stat().st_size == 0
        except OSError:
            return True

    def _append(self, content: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            if self._may_be_torn and not _ends_a_line(self._path):
                content = b"\n" + content
            written = file.write(content)
            if written != len(content):
                raise OSError(f"{written} of {len(content)} bytes written")


def _ends_a_line(path: Path) -> bool:
    """Return whether what comes next begins a line of its own."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
