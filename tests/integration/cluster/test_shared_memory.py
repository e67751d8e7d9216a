"""What a killed worker leaves in /dev/shm is unlinked, although its whole group was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deploy.processes import child_environment, find_marked

# A worker that, like vLLM's, has a spawned child which creates shared memory and a semaphore.
WORKER = """
import multiprocessing, sys, time
from multiprocessing.shared_memory import SharedMemory
from cluster.shared_memory import track_apart

def engine(lock):
    print(SharedMemory(create=True, size=4096).name, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    track_apart()
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    context.Process(target=engine, args=(lock,)).start()
    time.sleep(60)
"""


def test_a_killed_group_leaves_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    mark = f"shared-memory-test:{os.getpid()}"
    env = {**os.environ, **child_environment(mark), "PYTHONPATH": os.getcwd()}
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, process_group=0) as worker:
        assert worker.stdout is not None
        segment = Path("/dev/shm") / worker.stdout.readline().decode().strip()
        semaphores = {n for n in set(os.listdir("/dev/shm")) - before if n.startswith("sem.")}
        assert segment.exists() and semaphores
        os.killpg(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while segment.exists() or find_marked(mark):
        assert time.monotonic() < deadline, "the segment or its tracker is still there"
        time.sleep(0.02)
