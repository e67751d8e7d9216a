"""Whether the endpoint's port can be had, and who has it if not."""

import errno
import random
import socket

import psutil

from cluster.errors import TandemError

_RANGES_FROM, _RANGES_TO = 12_000, 32_000


class PortTaken(TandemError):
    """Something else listens on the endpoint's port."""


def require_free(host: str, port: int) -> None:
    """Raise `PortTaken` unless `port` can be listened on; name who has it where we may know."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do: a port whose last connections are still closing is not taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            # A listener that shares its port is only found by listening too.
            probe.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}") from None
        message = f"port {port} on {host} is taken{_owner(port)}; choose another with --port"
        raise PortTaken(message) from None


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def free_range(size: int) -> range:
    """Return `size` ports in a row that nothing listens on, away from those of other users."""
    while True:
        # Below what Linux gives to outgoing connections, so that none takes one meanwhile.
        first = random.SystemRandom().randrange(_RANGES_FROM, _RANGES_TO - size, size)
        ports = range(first, first + size)
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            is_it = connection.laddr and connection.laddr.port == port
            if is_it and connection.status == psutil.CONN_LISTEN and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
