"""Open-loop load whose rate follows a curve: what comes back late changes nothing about it."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.loadtest.client import Client
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.words import RequestRecord, Send

_TIMEOUT_S = 120.0


@dataclass
class LoadReport:
    """What became of every request: time to first token in seconds by start time, failures."""

    began_at: float
    ttft_s: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_sent: int = 0

    def ttft_quantile(self, q: float, begin_s: float, end_s: float) -> float:
        """Return the quantile over requests due between two moments of the run."""
        taken = sorted(ttft for at, ttft in self.ttft_s if begin_s <= at < end_s)
        return taken[min(len(taken) - 1, int(q * len(taken)))]


async def paced_load(
    url: str,
    model: str,
    rate: Callable[[float], float],
    prompt_tokens: int,
    output_tokens: int,
    is_over: Callable[[], bool],
    seed: int = 1,
) -> LoadReport:
    """Send streamed completions, `rate(seconds since the start)` of them per second, until
    `is_over`; return when the last one has ended."""
    rng = random.Random(seed)
    report = LoadReport(time.time())
    async with Client(Endpoint(url, model), _TIMEOUT_S) as client, asyncio.TaskGroup() as group:
        due_s = 0.0
        while not is_over():
            due_s += rng.expovariate(rate(due_s))
            await asyncio.sleep(client.zero + due_s - time.monotonic())
            prompt = tuple(rng.randrange(300, 4000) for _ in range(prompt_tokens))
            record = RequestRecord(report.num_sent, Send(due_s, prompt, output_tokens), due_s)
            report.num_sent += 1
            group.create_task(_send(client, record, report))
    return report


async def _send(client: Client, record: RequestRecord, report: LoadReport) -> None:
    await client.complete(record, client.endpoint.post(record.send, None))
    if record.ttft_s is not None:
        report.ttft_s.append((record.scheduled_s, record.ttft_s))
    if not record.is_completed:
        came = f"; {record.received_tokens} of {record.send.output_tokens} tokens came"
        # A stream that had begun says how far it came.
        has_begun = record.id is not None and not (record.error or "").startswith("HTTP")
        failure = f"at {record.scheduled_s:.1f} s: {record.error}{came if has_begun else ''}"
        report.failures.append(failure)
