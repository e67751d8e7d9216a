"""What each process of an engine does first: die with its parent, and get its CPU's tiles."""

import os
import select
import threading

import torch


def die_with_parent() -> None:
    """End this process at once when its parent ends, however that happens.

    SIGKILL of a Ray actor leaves its engine processes running and answering; each waits on
    its own parent's pidfd, so the tree goes from the top down within milliseconds.
    """
    descriptor = os.pidfd_open(os.getppid())

    def wait() -> None:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.poll()
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def claim_amx_tiles() -> None:
    """Ask the kernel for AMX tile permission; vLLM's CPU attention uses tiles without asking.

    A decode-only worker would die with SIGILL: no local prefill ever asks for it. A no-op on
    CPUs without AMX.
    """
    torch.cpu._init_amx()
