"""`tandem demo`: replays a slice of a real trace against a deployment and reports."""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
from rich.progress import Progress

from cluster.config import TandemConfig
from deploy.client import context_of, stream
from deploy.loadtest.prompts import FileTokenizer
from deploy.loadtest.words import Send, WorkloadSpec
from deploy.loadtest.workload import build
from deploy.report import Replayed, faults, rows

_MAX_OUTPUT = 128
_REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How much of the trace is replayed, and how fast."""

    num_requests: int
    rate_scale: float


def run(config: TandemConfig, url: str, plan: DemoPlan) -> int:
    """Replay, print the report, return the exit status: 1 if anything was lost or wasted."""
    sends = prepare(config, plan, context_of(url))
    print(f"replaying {len(sends)} requests over {sends[-1].at_s:.0f} s", flush=True)
    started_at = time.monotonic()
    replayed = asyncio.run(_replay(config.model.name, url, sends))
    duration_s = time.monotonic() - started_at
    _print_report(rows(replayed, duration_s))
    wrong = faults(replayed)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0


def prepare(config: TandemConfig, plan: DemoPlan, context: int) -> list[Send]:
    """Return what to send: the trace's arrivals, and text of its lengths scaled to the model."""
    workload = f"azure:max_output={min(_MAX_OUTPUT, context // 4)}"
    spec = WorkloadSpec(workload, time_scale=plan.rate_scale, num_requests=plan.num_requests)
    return build(spec, FileTokenizer(config.model.path), context, Random(0))


async def _replay(model: str, url: str, sends: Sequence[Send]) -> list[Replayed]:
    """Send every request at its time, whatever became of those before it."""
    limits = httpx.Limits(max_connections=len(sends))
    timeout = httpx.Timeout(_REQUEST_TIMEOUT_S)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        with _Progress(len(sends)) as advance:
            started_at = time.monotonic()
            work = (_one(client, model, send, started_at, advance) for send in sends)
            return await asyncio.gather(*work)


async def _one(
    client: httpx.AsyncClient,
    model: str,
    send: Send,
    started_at: float,
    advance: Callable[[], None],
) -> Replayed:
    replayed = Replayed(send.prompt_tokens, send.output_tokens, started_at + send.at_s)
    await asyncio.sleep(replayed.scheduled_at - time.monotonic())
    try:
        exchange_id = await stream(client, model, send.prompt_token_ids, replayed)
        record = await client.get(f"/admin/requests/{exchange_id}")
        replayed.record = record.json() if record.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError) as error:
        replayed.error = f"{type(error).__name__}: {error}"
    advance()
    return replayed


class _Progress:
    """A bar on a terminal, a line per tenth elsewhere. Yields the step function."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._num_done = 0
        self._bar: Any = None

    def __enter__(self) -> Callable[[], None]:
        if sys.stdout.isatty():
            self._bar = Progress()
            self._bar.start()
            self._task = self._bar.add_task("replay", total=self._total)
        return self._advance

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _advance(self) -> None:
        self._num_done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._num_done * 10 // self._total > (self._num_done - 1) * 10 // self._total:
            print(f"  {self._num_done} of {self._total} requests done", flush=True)


def _print_report(report: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in report)
    print()
    for name, figure in report:
        print(f"  {name.ljust(width)}  {figure}")
    print(flush=True)
