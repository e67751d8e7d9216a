"""Imports of thousands of modules at once."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector away from what is imported, now and later.

    It would look through all of it again and again, for a sixth of the time that importing vLLM
    takes, and find nothing; and each full collection of a process that has imported it would hold
    every thread for 0.6 s, as there are 700,000 objects to look at. vLLM's own server freezes
    them, too (`vllm/utils/gc_utils.py: freeze_gc_heap`).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
