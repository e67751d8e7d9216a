"""The run while it goes on: a page on a terminal, a line every few seconds elsewhere.

Drawing a page takes longer than requests may be late, so the terminal's is drawn by a process of
its own (`python -m deploy.loadtest.live`), which reads one JSON object a second.
"""

import json
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from deploy.loadtest.run import Glance

_PLAIN_EVERY_S = 5.0
_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60


@contextmanager
def watching(title: str) -> Iterator[Callable[[Glance], object]]:
    """Yield what shows a glance."""
    if not sys.stdout.isatty():
        yield _Lines().show
        return
    command = [sys.executable, "-m", "deploy.loadtest.live", title]
    painter = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert painter.stdin is not None
    pipe = painter.stdin

    def show(glance: Glance) -> None:
        # If nobody draws any more, the run goes on.
        with suppress(OSError):
            pipe.write(json.dumps(glance.as_document()) + "\n")
            pipe.flush()

    try:
        yield show
    finally:
        with suppress(OSError):
            pipe.close()
        painter.wait(10)


class _Lines:
    """Prints a line every few seconds."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def show(self, glance: Glance) -> None:
        if glance.elapsed_s >= self._next_s:
            self._next_s = glance.elapsed_s + _PLAIN_EVERY_S
            print(line_of(glance.as_document()), flush=True)


def line_of(glance: Mapping[str, Any]) -> str:
    """Return a glance in one line."""
    pools = "" if glance["decode"] is None else f", {glance['prefill']}P{glance['decode']}D"
    return (
        f"  {glance['elapsed_s']:6.0f} s  {glance['num_finished']}/{glance['num_requests']} done, "
        f"{glance['num_under_way']} under way, {glance['num_faults']} failed, "
        f"{glance['tokens_per_s']:.0f} tokens/s, "
        f"TTFT p50 {shown_ms(glance['ttft_p50_s'])} p90 {shown_ms(glance['ttft_p90_s'])}, "
        f"TPOT p50 {shown_ms(glance['tpot_p50_s'])}{pools}"
    )


def shown_ms(seconds: float | None) -> str:
    """Return milliseconds, "-" of nothing."""
    return "-" if seconds is None else f"{seconds * 1e3:.4g} ms"


def sparkline(values: deque[float]) -> str:
    """Return the values as a row of bars, the highest one full."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def _page(title: str, glance: Mapping[str, Any], tokens: deque[float], ttfts: deque[float]) -> Any:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    done, total = glance["num_finished"], glance["num_requests"]
    rows.add_row("requests", f"{done} of {total}", ProgressBar(total, done, width=_HISTORY))
    rows.add_row("time", f"{glance['elapsed_s']:.0f} s", f"of {glance['planned_s']:.0f} s planned")
    counts = f"{glance['num_under_way']}"
    rows.add_row("under way", counts, f"{glance['requests_per_s']:.1f} finished/s")
    failed = f"[bold red]{glance['num_faults']}[/]" if glance["num_faults"] else "0"
    rows.add_row("failed", failed, "")
    rows.add_row("tokens/s", f"{glance['tokens_per_s']:.0f}", sparkline(tokens))
    rows.add_row("TTFT p50", shown_ms(glance["ttft_p50_s"]), sparkline(ttfts))
    rows.add_row("TTFT p90", shown_ms(glance["ttft_p90_s"]), "")
    tpot = f"p90 {shown_ms(glance['tpot_p90_s'])}"
    rows.add_row("TPOT p50", shown_ms(glance["tpot_p50_s"]), tpot)
    rows.add_row("late p99", shown_ms(glance["late_p99_s"]), "the client's own delay")
    if glance["decode"] is not None:
        rows.add_row("pools", f"{glance['prefill']}P{glance['decode']}D", "")
    return Panel(rows, title=title, title_align="left", width=100)


def main() -> int:
    """Draw what comes on standard input until it ends."""
    from rich.live import Live

    # Ctrl-C ends the run, whose last figures then still come here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    title = sys.argv[1] if len(sys.argv) > 1 else ""
    tokens: deque[float] = deque(maxlen=_HISTORY)
    ttfts: deque[float] = deque(maxlen=_HISTORY)
    with Live(auto_refresh=False) as live:
        for line in sys.stdin:
            glance = json.loads(line)
            tokens.append(glance["tokens_per_s"])
            ttfts.append(glance["ttft_p50_s"] or 0.0)
            live.update(_page(title, glance, tokens, ttfts), refresh=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
