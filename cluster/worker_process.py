"""The actor's line to its worker, which runs in a process forked from the node's template.

The actor connects to `engine_template` and asks; what answers from then on is the fork itself,
`forked_worker`. After the request each message is one JSON document, and the end of the line
tells either side at once that the other is gone.
"""

import asyncio
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.errors import StartFailed, WorkerLost
from cluster.last_words import LastWords, points_elsewhere
from cluster.snapshot import WorkerEntry
from cluster.worker_spec import WorkerSpec

MAX_REQUEST_BYTES = 1 << 18
MAX_MESSAGE_BYTES = 1 << 16
_LAUNCH_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MAX_FORKS = 2
# glibc 2.35 and later; others ignore it. Has malloc ask for transparent huge pages, and take from
# one heap, which grows in steps that such pages fit in, whatever is below 32 MiB (the most it
# allows): a thread's arena has no huge pages, and a mapping of its own is faulted in at each use.
_MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "arena_max": 1,
        "top_pad": 64 * 2**20,
        "mmap_threshold": 32 * 2**20,
        "trim_threshold": 256 * 2**20,
    }.items()
)


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """Actor to template: who to become, in whose surroundings; stdio comes as descriptors."""

    spec: WorkerSpec
    environment: Mapping[str, str]
    folder: str
    cores: tuple[int, ...]
    actor_pid: int


REQUEST = TypeAdapter(ForkRequest)


def send(connection: socket.socket, document: Mapping[str, object]) -> None:
    connection.send(json.dumps(document).encode())


class WorkerProcess:
    """Stands in the actor for the `Worker` that runs in the forked process."""

    def __init__(self, spec: WorkerSpec, node: str) -> None:
        self._spec = spec
        self._name = _template_name(node)
        self._connection: socket.socket | None = None
        self._is_stopping = False

    async def start(self) -> WorkerEntry:
        """Have it forked and started; raise `StartFailed` with what it says went wrong."""
        words = LastWords()
        await self.fork()
        started = await self._receive()
        if started is None:
            cause = await asyncio.to_thread(words.cause)
            said = f"; the last it wrote: {cause}" if cause else ""
            raise StartFailed(f"its process ended while the engine started{said}")
        if "error" in started and points_elsewhere(started["error"]):
            cause = await asyncio.to_thread(words.cause)
            started["error"] = cause or started["error"]
        self._raise_error(started)
        return WorkerEntry.from_document(started["entry"])

    async def fork(self) -> None:
        """Return when the process is there; the first one of a node waits for the template."""
        for _ in range(_MAX_FORKS):
            self._connection = await self._ask_template()
            # None: the template ended just then, idle or killed; the next one is a new one.
            if (born := await self._receive()) is not None:
                break
        else:
            raise StartFailed("the node's template process ended before it forked")
        self._raise_error(born)

    def _raise_error(self, document: Mapping[str, Any]) -> None:
        if "error" in document:
            self._close()
            raise StartFailed(document["error"])

    async def run(self) -> None:
        """Return when the process has been stopped; raise `WorkerLost` if it ended by itself."""
        while await self._receive() is not None:
            pass
        if not self._is_stopping:
            raise WorkerLost(f"the process of {self._spec.worker_id} ended")

    async def stop(self) -> None:
        self._is_stopping = True
        if self._connection is not None:
            with suppress(OSError):
                send(self._connection, {"stop": True})

    async def _receive(self) -> dict[str, Any] | None:
        """Return the next document, None when the other end is gone."""
        if self._connection is None:
            return None
        frame = b""
        with suppress(OSError):
            frame = await asyncio.get_running_loop().sock_recv(self._connection, MAX_MESSAGE_BYTES)
        if not frame:
            self._close()
            return None
        document: dict[str, Any] = json.loads(frame)
        return document

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _ask_template(self) -> socket.socket:
        connection = await self._connect()
        cores = tuple(sorted(os.sched_getaffinity(0)))
        request = ForkRequest(self._spec, dict(os.environ), os.getcwd(), cores, os.getpid())
        # Unset fields stay unset: the worker tells a default from a choice.
        frame = REQUEST.dump_json(request, exclude_unset=True)
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(connection, [frame], [0, 1, 2])
        connection.setblocking(False)
        return connection

    async def _connect(self) -> socket.socket:
        """Return a connection to the node's template, which is started if there is none."""
        deadline, is_launched = time.monotonic() + _LAUNCH_TIMEOUT_S, False
        while time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(f"\0{self._name}")
            except ConnectionRefusedError:
                connection.close()
            else:
                return _trusted(connection)
            if not is_launched:
                await asyncio.to_thread(_launch_template, self._name)
                is_launched = True
            await asyncio.sleep(_POLL_S)
        raise StartFailed(f"no template process within {_LAUNCH_TIMEOUT_S:.0f} s")


def peer_uid(connection: socket.socket) -> int:
    """Return the user at the other end of a Unix socket."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", credentials)[1])


def _trusted(connection: socket.socket) -> socket.socket:
    """Return a connection to a process of our user; anybody may take an abstract name, and what
    is sent next holds this process's environment."""
    if (uid := peer_uid(connection)) == os.getuid():
        return connection
    connection.close()
    raise StartFailed(f"user {uid} listens where this user's template process should")


def _template_name(node: str) -> str:
    """One template per deployment, node and installation; Ray nodes may share a machine."""
    parts = (os.environ.get("TANDEM_DEPLOYMENT", ""), node, sys.executable)
    return "tandem-template-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _launch_template(name: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # With one thread no library starts a pool on import or in a small operation; the process
        # that computes sets its own number.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **memory_environment(),
    }
    command = [sys.executable, "-m", "cluster.engine_template", name, str(os.getppid())]
    subprocess.run(command, env=environment, check=True)


def memory_environment() -> dict[str, str]:
    """Return what has engine processes allocate memory as they should.

    A CPU engine reads all its weights and the request's KV cache in every step: in pages of 4 KiB
    it waits for page tables (a tenth of a step in `make bench-serve`).
    """
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), _MALLOC)))
    return {"GLIBC_TUNABLES": tunables, **_preloads()}


def _preloads() -> dict[str, str]:
    """Return what vLLM's CPU platform has its processes preload (`platforms/cpu.py:447`)."""
    torch, vllm = importlib.util.find_spec("torch"), importlib.util.find_spec("vllm")
    if "+cpu" not in importlib.metadata.version("torch") or not (torch and vllm):
        return {}
    assert torch.origin is not None and vllm.origin is not None
    site, library = Path(torch.origin).parents[1], Path(torch.origin).parent / "lib"
    patterns = [Path(vllm.origin).parent / "libs" / "libtcmalloc*.so*"]
    patterns += [site / "torch.libs" / "libgomp*.so*", library / "libgomp*.so*"]
    found = [sorted(glob.glob(str(pattern))) for pattern in patterns]
    libraries = [os.environ.get("LD_PRELOAD", ""), *(paths[0] for paths in found if paths)]
    return {"LD_PRELOAD": ":".join(filter(None, libraries))}
