"""The processes of one deployment on this machine: marked at birth, found and ended by the mark.

Every process inherits `TANDEM_DEPLOYMENT=<name>:<uuid>`; `/proc/<pid>/environ` shows it as long
as a process title does not overwrite it, which `SPT_NOENV` forbids. Nothing is ever matched by
its name, and a process is signalled through a pidfd, so a reused pid is never hit.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "TANDEM_DEPLOYMENT"
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid and the clock tick it started at: together they name one process for good."""

    pid: int
    start_tick: int

    @classmethod
    def of(cls, pid: int) -> "ProcessId | None":
        """Return the process that has `pid` now, None if there is none."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The second field is the command in brackets and may hold anything.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] == "Z" else cls(pid, int(fields[19]))

    @property
    def is_alive(self) -> bool:
        return ProcessId.of(self.pid) == self


def child_environment(mark: str) -> dict[str, str]:
    """Return the variables that mark the processes of one deployment."""
    return {MARK: mark, "SPT_NOENV": "1"}


def find_marked(mark: str) -> list[ProcessId]:
    """Return the live processes that carry exactly this mark, this process excepted."""
    return [p for p in _all_processes() if p.pid != os.getpid() and _has_mark(p.pid, mark)]


def _all_processes() -> Iterator[ProcessId]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := ProcessId.of(int(entry))):
            yield process


def _has_mark(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def end_marked(mark: str, grace_s: float) -> int:
    """End every process of the mark: SIGTERM, and SIGKILL after `grace_s`; return how many."""
    first = find_marked(mark)
    for process in first:
        send_signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (left := find_marked(mark)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    while left:
        for process in left:
            send_signal(process, signal.SIGKILL)
        time.sleep(_POLL_S)
        left = find_marked(mark)
    return len(first)


def send_signal(process: ProcessId, number: signal.Signals) -> None:
    """Signal exactly this process; one that has ended already is left alone."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            # The pidfd holds on to whoever has the pid now; only then is it compared.
            if process.is_alive:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def wait_for_end(process: ProcessId, limit_s: float) -> bool:
    """Return whether `process` ended within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while process.is_alive and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return not process.is_alive
