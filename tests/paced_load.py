"""Open-loop load whose rate follows a curve: what comes back late changes nothing about it."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

_TIMEOUT_S = 120.0


@dataclass
class LoadReport:
    """What became of every request: time to first token in seconds by start time, failures."""

    began_at: float
    ttft_s: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_sent: int = 0

    def ttft_quantile(self, q: float, begin_s: float, end_s: float) -> float:
        """Return the quantile over requests sent between two moments of the run."""
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
    began = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with (
        httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        due_s = 0.0
        while not is_over():
            due_s += rng.expovariate(rate(due_s))
            await asyncio.sleep(began + due_s - time.monotonic())
            prompt = [rng.randrange(300, 4000) for _ in range(prompt_tokens)]
            report.num_sent += 1
            group.create_task(_send(client, model, prompt, output_tokens, due_s, report))
    return report


async def _send(
    client: httpx.AsyncClient,
    model: str,
    prompt: list[int],
    output_tokens: int,
    due_s: float,
    report: LoadReport,
) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    sent = time.monotonic()
    num_tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode()
                report.failures.append(f"at {due_s:.1f} s: {response.status_code}: {text[:300]}")
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {") and '"token_ids":[' in line.replace(" ", ""):
                    if num_tokens == 0:
                        report.ttft_s.append((due_s, time.monotonic() - sent))
                    chunk = httpx.Response(200, content=line[6:]).json()
                    num_tokens += sum(len(c.get("token_ids") or ()) for c in chunk["choices"])
    except httpx.HTTPError as error:
        report.failures.append(f"at {due_s:.1f} s: {error!r}")
        return
    if num_tokens != output_tokens:
        report.failures.append(f"at {due_s:.1f} s: {num_tokens} of {output_tokens} tokens came")
