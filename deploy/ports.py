"""Ports that are free, and who has the endpoint's if it is not."""

import errno
import random
import socket

import psutil

from cluster.errors import TandemError

# Below what Linux gives to outgoing connections and to servers that ask for any port, one of which
# would take a port between its choice and its use; above what `ray start` gives to Ray's workers.
_RANGES = range(20_000, 28_000)
_SINGLES = range(28_000, 30_000)
_TRIES = 1000


class PortTaken(TandemError):
    """Something else listens on the port, or on all there are to choose from."""


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
    """Return a port that nothing listens on and that no other caller of this gets.

    It is kept from other processes that ask here for as long as this process lives. `PortTaken`
    if there is none.
    """
    return _reserve(1, _SINGLES).start


def free_range(size: int) -> range:
    """Return `size` ports in a row of which the same holds, `size` being the same at each call."""
    return _reserve(size, _RANGES)


def _reserve(size: int, within: range) -> range:
    for _ in range(_TRIES):
        first = random.SystemRandom().randrange(within.start, within.stop - size, size)
        ports = range(first, first + size)
        # Who chose a port is told by the UDP port of the same number, which nothing here uses for
        # itself; once detached, the kernel frees it with the process.
        with socket.socket(type=socket.SOCK_DGRAM) as mark:
            try:
                mark.bind(("127.0.0.1", first))
            except OSError:
                continue
            if all(_is_free(port) for port in ports):
                mark.detach()
                return ports
    raise PortTaken(f"no {size} free ports in a row from {within.start} to {within.stop - 1}")


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
