"""How the processes of one worker get its ring: a file in memory that the actor holds open.

It has no name on any disk that could be left behind, and is gone with the actor however that
ends. The engine's processes open it through `/proc/<pid>/fd`, which the kernel allows to the same
user only.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from cluster.errors import ConfigError
from cluster.keyring import Keyring, parse_keyring
from cluster.watched_file import WatchedFile

KeySource = Callable[[], Keyring]


class RingFile:
    """One ring in a file; `path` stays the same when the ring is replaced."""

    def __init__(self, ring: Keyring) -> None:
        self._fd = _write(ring)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def replace(self, ring: Keyring) -> None:
        """Readers see the old ring or the new one, never a mixture."""
        fd = _write(ring)
        try:
            os.dup2(fd, self._fd, inheritable=False)
        finally:
            os.close(fd)

    def close(self) -> None:
        os.close(self._fd)


def _write(ring: Keyring) -> int:
    fd = os.memfd_create("tandem-keys", os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.write(fd, ring.as_text().encode())
    return fd


def key_source(path: str | None) -> KeySource | None:
    """Return what reads the ring in a file, None for none; raise `ConfigError`."""
    if path is None:
        return None
    read = WatchedFile(Path(path), parse_keyring).read
    if Path(path).stat().st_mode & stat.S_IRWXO:
        raise ConfigError(f"{path}: every user may read these secrets; chmod o-rwx")
    return read
