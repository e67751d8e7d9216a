"""A process of an engine ends with its parent, even one that is gone before it could look."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.waiting import wait_for

# The parent's process starts a child as vLLM starts its engine core, and names its pid.
_PARENT = """
import multiprocessing, time
from tests.integration.cluster import test_process_guard as guarded
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=getattr(guarded, "{target}"))
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


def guarded_from_the_start() -> None:
    from cluster.process_guard import die_with_parent

    die_with_parent()
    _live_on("guarded")


def guarded_too_late() -> None:
    """Still importing, as it were, when the parent ends."""
    from cluster.process_guard import die_with_parent

    parent = os.getppid()
    print("importing", flush=True)
    wait_for(lambda: os.getppid() != parent, 60)
    die_with_parent()
    _live_on("survived")


def _live_on(word: str) -> None:
    print(word, flush=True)
    signal.pause()


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def parent(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    script = _PARENT.format(target=request.param)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("parent", "word"),
    [("guarded_from_the_start", "guarded"), ("guarded_too_late", "importing")],
    indirect=["parent"],
)
def test_a_killed_parent_takes_its_child_along(parent: "subprocess.Popen[str]", word: str) -> None:
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline().strip() == word
    parent.kill()
    wait_for(lambda: _is_gone(child), 5)
    assert "survived" not in parent.stdout.read()
