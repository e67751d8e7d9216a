"""The cures for vLLM's CPU engine, on vLLM's own parts."""

import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators import shm_broadcast

from cluster.vllm_cpu import sleep_when_idle

PAUSE_S = 1.2
ROUNDS = 3


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    original = shm_broadcast.SpinCondition.wait
    sleep_when_idle()
    yield
    shm_broadcast.SpinCondition.wait = original  # type: ignore[method-assign]


def test_an_idle_reader_sleeps_and_still_hears_soon() -> None:
    writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
    heard: list[tuple[float, float]] = []

    def read() -> None:
        reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
        reader.wait_until_ready()
        for _ in range(ROUNDS):
            sent_at = reader.dequeue(timeout=30)
            heard.append((time.monotonic() - sent_at, time.thread_time()))
        reader.shutdown()

    thread = threading.Thread(target=read)
    thread.start()
    writer.wait_until_ready()
    for _ in range(ROUNDS):
        # A little over the second that vLLM's own reader spins: the pause itself is under test.
        time.sleep(PAUSE_S)
        writer.enqueue(time.monotonic())
    thread.join(30)
    writer.shutdown()
    assert not thread.is_alive()
    assert max(delay_s for delay_s, _ in heard) < 0.3
    busy_s = heard[-1][1] - heard[0][1]
    assert busy_s < 0.25 * PAUSE_S * (ROUNDS - 1), "the idle reader spins"
