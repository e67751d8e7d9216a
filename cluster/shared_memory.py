"""Shared memory of a killed worker: unlinked by a tracker that is not killed with it.

Python unlinks what a killed process leaves in /dev/shm from a tracker process, which its children
share. Ray ends a dead worker's children and its whole process group with SIGKILL, the tracker
included, and then nobody unlinks: one vLLM engine leaves 160 MB and a semaphore.
"""

import os
import subprocess
import sys
from multiprocessing import resource_tracker
from typing import Any

_SECOND_PARENT = "import os; os.fork() and os._exit(0); os.setsid()"
_TRACK = "from multiprocessing.resource_tracker import main; main({})"


def track_apart() -> None:
    """Make this process's resource tracker one that is no child of it, in a session of its own.

    Call before anything creates shared memory or spawns a process. The tracker ends when this
    process and all that it spawned have.
    """
    reader, writer = os.pipe()
    code = f"{_SECOND_PARENT}; {_TRACK.format(reader)}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], pass_fds=[reader], check=True)
    os.close(reader)
    # What `ensure_running` sets for a tracker that it starts itself; there is no public way.
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = writer
