"""Processes are known by pid and start, found by their mark, and ended only if both fit."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.processes import (
    ProcessId,
    child_environment,
    end_marked,
    find_marked,
    send_signal,
    wait_for_end,
)

MARK = f"unit-test:{os.getpid()}"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    # `exec` keeps the environment that /proc shows; a shell builtin starts in a millisecond.
    env = {**os.environ, **child_environment(MARK)}
    process = subprocess.Popen(["sleep", "60"], env=env)
    yield process
    process.kill()
    process.wait()


def test_this_process_is_alive_and_a_reused_pid_is_not_it() -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None and own.is_alive
    assert not ProcessId(own.pid, own.start_tick - 1).is_alive


def test_marked_processes_are_found_by_the_whole_mark(sleeper: subprocess.Popen[bytes]) -> None:
    assert [process.pid for process in find_marked(MARK)] == [sleeper.pid]
    assert find_marked(MARK + "0") == []
    assert find_marked(MARK[:-1]) == []


def test_ending_the_marked_leaves_none(sleeper: subprocess.Popen[bytes]) -> None:
    assert end_marked(MARK, grace_s=5.0) == 1
    assert sleeper.wait(5.0) == -signal.SIGTERM


def test_a_process_that_ignores_the_request_is_killed() -> None:
    code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    code += "print('up', flush=True); time.sleep(60)"
    env = {**os.environ, **child_environment(MARK)}
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert end_marked(MARK, grace_s=0.1) == 1
        assert process.wait(5.0) == -signal.SIGKILL


def test_a_signal_never_hits_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    stranger = ProcessId(sleeper.pid, 1)
    send_signal(stranger, signal.SIGKILL)
    assert sleeper.poll() is None
    assert wait_for_end(stranger, 0.0)
