"""A worker's process from its fork to its end; `worker_process` is the actor's end of its line.

It ends with the actor, and every process forked below it ends with its own parent.
"""

import asyncio
import ctypes
import logging
import os
import select
import signal
import socket
import threading

from cluster.shared_memory import track_apart
from cluster.worker import Worker
from cluster.worker_process import MAX_MESSAGE_BYTES, ForkRequest, send
from cluster.worker_spec import WorkerSpec, load

_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def become_worker(connection: socket.socket, request: ForkRequest) -> int:
    """Run the requested worker in this fresh fork to its end; return the exit status."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    os.sched_setaffinity(0, request.cores)
    load("cluster.vllm_engine:settle_fork")(f"{request.spec.worker_id}, actor {request.actor_pid}")
    _bind_forks(connection)
    track_apart()
    threading.Thread(target=_end_with_actor, args=(connection,), daemon=True).start()
    send(connection, {"pid": os.getpid()})
    return asyncio.run(_serve(connection, request.spec))


def _end_with_actor(connection: socket.socket) -> None:
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    poller.poll()
    os._exit(1)


def _bind_forks(connection: socket.socket) -> None:
    """Have every process forked below here end with its parent and let go of the actor's line.

    From its first instruction on: an engine that is still loading has no guard of its own yet.
    """
    parent_pid = os.getpid()
    libc = ctypes.CDLL(None)
    settle = load("cluster.vllm_engine:settle_engine_fork")

    def note_parent() -> None:
        nonlocal parent_pid
        parent_pid = os.getpid()

    def settle_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
        connection.close()
        settle()

    os.register_at_fork(before=note_parent, after_in_child=settle_child)


async def _serve(connection: socket.socket, spec: WorkerSpec) -> int:
    connection.setblocking(False)
    told_to_stop = asyncio.create_task(_stop_order(connection))
    try:
        worker = Worker(spec)
        starting = asyncio.create_task(worker.start())
        await asyncio.wait([starting, told_to_stop], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # A thread is still waiting for the engine's processes, which end with this one.
            os._exit(0)
        send(connection, {"entry": starting.result().as_document()})
    except Exception as error:
        logger.exception("%s did not start", spec.worker_id)
        reason = str(error).strip().partition("\n")[0]
        send(connection, {"error": f"{type(error).__name__}: {reason}"})
        return 1
    running = asyncio.create_task(worker.run())
    await asyncio.wait([running, told_to_stop], return_when=asyncio.FIRST_COMPLETED)
    await worker.stop()
    await running
    return 0


async def _stop_order(connection: socket.socket) -> None:
    await asyncio.get_running_loop().sock_recv(connection, MAX_MESSAGE_BYTES)
