"""Peers to measure beside: installed for one run into a folder of its own, and ended with it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from deploy.processes import child_environment, end_marked

_INSTALL_LIMIT_S = 600.0
_END_GRACE_S = 10.0


class Unavailable(Exception):
    """This stack does not run here; the rest is measured without it."""


def make_python(folder: Path) -> str:
    """Return the Python of a virtual environment made in `folder`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return str(folder / "bin" / "python")


def install(python: str, *arguments: str) -> None:
    """Call `pip install`; raise `Unavailable` with the line that says why it failed."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    wanted = " ".join(name for name in arguments if not name.startswith(("-", "/")))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"not installed within {_INSTALL_LIMIT_S:g} s: {wanted}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise Unavailable(f"not installable: {wanted}: {why}")


@contextmanager
def marked() -> Iterator[dict[str, str]]:
    """Yield variables for children; whatever still runs with them at the end is ended.

    A server that dies early leaves its engine behind, as nobody's child.
    """
    mark = f"peers:{uuid4()}"
    try:
        yield child_environment(mark)
    finally:
        end_marked(mark, _END_GRACE_S)
