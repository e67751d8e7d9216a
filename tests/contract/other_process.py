"""Another process with one end of a hand-off, for what only two of them show."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest


def heard(pipe: "Connection[Any, Any]") -> Any:
    assert pipe.poll(30), "the other process says nothing"
    return pipe.recv()


@pytest.fixture
def other() -> Iterator[Callable[..., tuple[multiprocessing.Process, "Connection[Any, Any]"]]]:
    """Run a function in a process of its own, with a pipe; killed afterwards."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Any, Any]] = []

    def start(target: Callable[..., None], *arguments: object) -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
        return process, ours

    yield start
    for process, pipe in started:
        process.kill()
        process.join()
        process.close()
        pipe.close()
