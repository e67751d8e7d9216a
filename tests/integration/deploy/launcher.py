"""`tandem` as its users run it, and everything one run of it occupies on this machine."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.ports import free_port
from deploy.processes import find_marked
from deploy.state import DeploymentState

START_S = 150.0
# `Deployment.stop` takes at most about 12 s; a busy machine takes its time around it.
STOP_S = 30.0
_SHARED_MEMORY = re.compile(r"(/dev/shm/\S+)")


@dataclass
class Launcher:
    """One `tandem serve` of the simulated engine."""

    name: str
    port: int = field(default_factory=free_port)
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    log: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, verb: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", verb, "--name", self.name, *flags]

    def start(self) -> None:
        """Return at once; `wait_until` tells how far it is."""
        command = self.command("serve", "--simulated", "--port", str(self.port), *self.flags)
        with self._log_file.open("w") as output:
            # A session of its own, as a terminal gives a job: its signals are not ours.
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def _log_file(self) -> Path:
        return Path(tempfile.gettempdir()) / f"{self.name}.log"

    def wait_until(self, said: str, limit_s: float = START_S) -> None:
        """Return once the launcher has printed `said`."""
        deadline = time.monotonic() + limit_s
        while said not in self.read():
            assert self.process is not None
            assert self.process.poll() is None, f"ended before {said!r}:\n{self.log}"
            assert time.monotonic() < deadline, f"no {said!r} in {limit_s} s:\n{self.log}"
            time.sleep(0.05)

    def read(self) -> str:
        """Return everything printed so far."""
        self.log = self._log_file.read_text()
        return self.log

    def signal(self, number: signal.Signals) -> int:
        """Send the signal and return the exit status, which must come within the limit."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(STOP_S)
        self.read()
        return status

    def forget(self) -> None:
        self._log_file.unlink(missing_ok=True)

    def run(self, verb: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb, *flags), capture_output=True, text=True, timeout=60, check=False
        )

    def complete(self) -> httpx.Response:
        """Return the answer to the request of the printed curl line."""
        (line,) = (line for line in self.read().splitlines() if line.startswith("curl "))
        url = line.split()[1]
        body = line.partition(" -d '")[2].removesuffix("'")
        headers = {"content-type": "application/json"}
        return httpx.post(url, content=body, headers=headers, timeout=30.0)


@contextmanager
def serving(launcher: Launcher) -> Iterator["Footprint"]:
    """Run `tandem serve`, and yield what it occupies once it serves."""
    with started(launcher):
        launcher.wait_until("serving after")
        yield Footprint.of(launcher)


@contextmanager
def started(launcher: Launcher) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tandem serve`; whatever happens, leave nothing of it behind."""
    launcher.start()
    assert launcher.process is not None
    try:
        yield launcher.process
    finally:
        launcher.process.kill()
        launcher.process.wait()
        launcher.run("down")
        launcher.forget()


@dataclass(frozen=True)
class Footprint:
    """What a running deployment occupies: processes, ports, shared memory, files."""

    mark: str
    pids: frozenset[int]
    ports: frozenset[int]
    shared_memory: frozenset[str]
    temp_dir: str | None

    @classmethod
    def of(cls, launcher: Launcher) -> "Footprint":
        state = DeploymentState.read(launcher.name)
        assert state is not None and launcher.process is not None
        return cls.marked(state.mark, state.temp_dir, launcher.process.pid)

    @classmethod
    def marked(cls, mark: str, temp_dir: str | None = None, *others: int) -> "Footprint":
        """Return what the processes of the mark, and others, occupy."""
        pids = [*(p.pid for p in find_marked(mark)), *others]
        ports = {port for pid in pids for port in _ports(pid)}
        memory = {path for pid in pids for path in _shared_memory(pid)}
        return cls(mark, frozenset(pids), frozenset(ports), frozenset(memory), temp_dir)

    def leftovers(self) -> list[str]:
        """Return what is still there, as text."""
        left = [f"process {p.pid}" for p in find_marked(self.mark)]
        left += [path for path in self.shared_memory if Path(path).exists()]
        if self.temp_dir is not None and Path(self.temp_dir).exists():
            left.append(self.temp_dir)
        # Another process may have been given one of the ports since; a listener whose process
        # we may not see counts as ours.
        ours = {*self.pids, None}
        held = [c for c in psutil.net_connections("tcp") if c.pid in ours]
        return left + [f"port {port}" for port in self.ports & _listening(held)]


def _listening(connections: Iterable[Any]) -> set[int]:
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def _ports(pid: int) -> set[int]:
    with suppress(psutil.Error):
        return _listening(psutil.Process(pid).net_connections("tcp"))
    return set()


def _shared_memory(pid: int) -> set[str]:
    with suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text()
        return set(_SHARED_MEMORY.findall(maps))
    return set()


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.1)
