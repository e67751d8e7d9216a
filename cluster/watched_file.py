"""A file that an operator may replace while processes run: keys, for example.

It is looked at when it is asked for, at most once a second, and read again only if it has changed
(a Kubernetes secret changes by its link). What cannot be read or understood is refused at the
start; later the last good content stays in force, and the log says so.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from cluster.errors import ConfigError

_LOOK_S = 1.0

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


def read_parsed(path: Path, parse: Callable[[bytes], Value]) -> Value:
    """Return what `parse` makes of a file; raise `ConfigError`, which names the file."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class WatchedFile(Generic[Value]):
    """The value that `parse` makes of the file at `path`; its errors must not quote the content."""

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes], Value],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._parse = parse
        self._clock = clock
        self._looked_s = self._clock()
        self._is_failing = False
        self._stamp, self._value = self._load()

    def read(self) -> Value:
        """Return the content in force."""
        now = self._clock()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            if _stamp(self._path) == self._stamp:
                return
            self._stamp, self._value = self._load()
        except (OSError, ConfigError) as error:
            if not self._is_failing:
                logger.error("what was read before stays in force: %s", error)
            self._is_failing = True
            return
        self._is_failing = False
        logger.info("%s has changed and was read again", self._path)

    def _load(self) -> tuple[tuple[int, ...], Value]:
        try:
            # Before the content: a change in between is then seen the next time.
            stamp = _stamp(self._path)
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from None
        return stamp, read_parsed(self._path, self._parse)


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size
