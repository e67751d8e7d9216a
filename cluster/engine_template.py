"""The node's template: a process that has imported vLLM once and forks workers from itself.

Nearly all of a worker's start is imports, in three processes one after another; a fork has them.
A fork is safe while the parent has one thread: libgomp's pool, once started, does not survive
one. So this process runs no asyncio, no Ray and no tensor operation, and refuses to fork if it
finds a second thread in itself.

`python -m cluster.engine_template NAME RAYLET_PID` listens on the abstract socket NAME, where
`worker_process.WorkerProcess` sends one request per connection. It ends with the raylet, with its
deployment (it carries the mark), or when it had nothing to do for some minutes.
"""

import logging
import os
import selectors
import socket
import sys
import time
from contextlib import suppress

import setproctitle

from cluster.forked_worker import become_worker
from cluster.imports import uncollected
from cluster.worker_process import MAX_REQUEST_BYTES, REQUEST, ForkRequest, peer_uid, send
from cluster.worker_spec import load

_IDLE_S = 180.0
_REQUEST_TIMEOUT_S = 5.0
_BACKLOG = 128
_STDIO = (0, 1, 2)

logger = logging.getLogger(__name__)


class Template:
    """Accepts requests, forks, and reaps; `_children` has a pidfd for every living worker."""

    def __init__(self, listener: socket.socket, raylet: int) -> None:
        self._listener = listener
        self._raylet = raylet
        self._children: dict[int, int] = {}
        self._is_warm = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(raylet, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the raylet ends, or until there was no worker and no request for long."""
        idle_since = time.monotonic()
        while self._children or time.monotonic() - idle_since < _IDLE_S:
            for key, _ in self._selector.select(timeout=_IDLE_S):
                idle_since = time.monotonic()
                if key.fd == self._raylet:
                    return
                if key.fd in self._children:
                    self._reap(key.fd)
                else:
                    self._accept()

    def _reap(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        os.waitpid(self._children.pop(descriptor), 0)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            descriptors: list[int] = []
            try:
                # Abstract sockets have no owner: anyone on this machine may connect.
                if peer_uid(connection) == os.getuid():
                    connection.settimeout(_REQUEST_TIMEOUT_S)
                    frame, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
                    self._fork(connection, REQUEST.validate_json(frame), descriptors)
            except (OSError, ValueError) as error:
                logger.exception("a request for a worker failed")
                with suppress(OSError):
                    send(connection, {"error": f"{type(error).__name__}: {error}"})
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _fork(self, connection: socket.socket, request: ForkRequest, stdio: list[int]) -> None:
        if not self._is_warm:
            warm_up(request)
            self._is_warm = True
        if (num_threads := len(os.listdir("/proc/self/task"))) > 1:
            send(connection, {"error": f"the template has {num_threads} threads: cannot fork"})
            return
        pid = os.fork()
        if pid == 0:
            self._live_as_worker(connection, request, stdio)
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = pid
        self._selector.register(descriptor, selectors.EVENT_READ)

    def _live_as_worker(
        self, connection: socket.socket, request: ForkRequest, stdio: list[int]
    ) -> None:
        """In the fork: run the worker to its end; never returns to the template's loop."""
        status = 1
        try:
            self._selector.close()
            self._listener.close()
            for descriptor in (self._raylet, *self._children):
                os.close(descriptor)
            for target, source in zip(_STDIO, stdio, strict=True):
                os.dup2(source, target)
                os.close(source)
            connection.settimeout(None)
            status = become_worker(connection, request)
        except BaseException:
            logger.exception("the worker process ended")
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def warm_up(request: ForkRequest) -> None:
    """Import what workers will; what fails here fails again in the worker, which reports it.

    Forks share these pages until someone writes: the collector, kept away, does not.
    """
    spec = request.spec
    try:
        with uncollected():
            for path in (spec.engine, *spec.roles.values()):
                load(path)
            load("cluster.vllm_engine:import_engine")(spec.config.model)
    except Exception:
        logger.exception("the template could not import everything")


def main(name: str, raylet_pid: int) -> None:
    # It looks for the title's memory at its first call, and finds none once variables have moved.
    setproctitle.getproctitle()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
    except OSError:
        # Another worker of this node was faster; its template serves both.
        return
    listener.listen(_BACKLOG)
    # No child of the actor that starts it, nor in its process group: Ray ends both with it. Its
    # session stays: with one of their own, all engines of the node would share a single
    # scheduling group (`sched_autogroup`), and starve beside everything else.
    if os.fork():
        os._exit(0)
    os.setpgid(0, 0)
    with suppress(ProcessLookupError):
        Template(listener, os.pidfd_open(raylet_pid)).run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
