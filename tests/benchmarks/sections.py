"""Where benchmark figures go: one section per benchmark of docs/benchmarks.md."""

import datetime
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> str:
    """Return one line on where the figures come from."""
    with open("/proc/cpuinfo") as file:
        found = re.search(r"model name\s*:\s*(.*)", file.read())
    name = found.group(1) if found else platform.processor()
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, Python {platform.python_version()}, {datetime.date.today()}"


def write_section(name: str, command: str, body: str) -> None:
    """Print `body` and put it in place of what the last run of the benchmark wrote."""
    print(body, flush=True)
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    section = f"{start}\n\n`{command}` on {machine()}\n\n{body}\n\n{end}"
    page = PAGE.read_text() if PAGE.exists() else "# Benchmarks\n"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        page = pattern.sub(lambda _: section, page)
    else:
        page = f"{page.rstrip()}\n\n{section}\n"
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
