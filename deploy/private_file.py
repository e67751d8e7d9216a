"""Files with secrets: written whole or not at all, readable by their owner only."""

import os
from pathlib import Path

from cluster.errors import ConfigError


def write_private(path: Path, content: str, is_new: bool = False) -> None:
    """Replace the file; with `is_new` refuse to if there is one. Mode 0600 from its first byte."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(partial, flags, 0o600), "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link fails where a file is already, which a rename does not.
            os.link(partial, path) if is_new else partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError:
        raise ConfigError(f"{path} is there already: choose another, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def read_secret(path: Path) -> str:
    """Return the one line of text in a file, as a key; raise `ConfigError`."""
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: not text") from None
    if not text or not text.isascii() or not text.isprintable():
        raise ConfigError(f"{path}: not a key: one line of printable characters is wanted")
    return text
