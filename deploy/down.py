"""Stopping a deployment from outside its launcher, and clearing what a killed one left."""

import os
import shutil
import signal
from collections.abc import Callable

from cluster.errors import TandemError
from deploy.processes import end_marked, find_marked, send_signal, wait_for_end
from deploy.state import DeploymentState, known_names

__all__ = ["clean_up_before_start", "known_names", "take_down"]

# A launcher that was asked to stop needs at most about 13 s.
_LAUNCHER_STOP_S = 15.0
_TERM_GRACE_S = 2.0


def take_down(name: str) -> str:
    """Stop the deployment and remove all it left; return what was done, in one line."""
    state = DeploymentState.read(name)
    if state is None:
        return f"tandem: no deployment named {name!r} runs here"
    was_running = state.launcher.is_alive
    if was_running:
        send_signal(state.launcher, signal.SIGTERM)
        if not wait_for_end(state.launcher, _LAUNCHER_STOP_S):
            send_signal(state.launcher, signal.SIGKILL)
    num_ended = _clear(state)
    how = "stopped" if was_running else "cleaned up after"
    rest = f", {num_ended} left-over processes ended" if num_ended else ""
    return f"tandem: {how} {name!r}{rest}"


def clean_up_before_start(name: str, say: Callable[[str], None]) -> None:
    """Clear what a dead launcher of this name left; raise if a live one holds the name."""
    state = DeploymentState.read(name)
    if state is None:
        return
    if state.launcher.is_alive and state.launcher.pid != os.getpid():
        raise TandemError(
            f"deployment {name!r} already runs at {state.url} (pid {state.launcher.pid}); "
            f"stop it with `tandem down --name {name}` or start another with --name"
        )
    num_ended = _clear(state)
    say(f"cleaned up after an earlier {name!r} ({num_ended} left-over processes)")


def _clear(state: DeploymentState) -> int:
    """End what carries the deployment's mark, here and in a cluster it was attached to."""
    if state.temp_dir is None and state.ray_address is not None:
        from deploy.attached import remove_from_cluster

        remove_from_cluster(state)
    num_ended = end_marked(state.mark, _TERM_GRACE_S) if find_marked(state.mark) else 0
    if state.temp_dir is not None:
        shutil.rmtree(state.temp_dir, ignore_errors=True)
    state.remove()
    return num_ended
