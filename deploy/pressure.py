"""A steady load on the endpoint: clients that each keep one request open, and what they saw."""

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from autoscaler.calibration import Measurement, Objectives
from autoscaler.ratio import Sizes
from deploy.client import stream
from deploy.loadtest.prompts import PromptSource
from deploy.report import Replayed, percentile

_REQUEST_TIMEOUT_S = 120.0
_AFTER_FAILURE_S = 0.25
# Before the window: clients start one after the other, and queues find their length.
_SETTLE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Pressure:
    """What every client sends, and for how long it is measured; latencies at `quantile`."""

    url: str
    model: str
    input_tokens: int
    output_tokens: int
    duration_s: float
    quantile: float

    @property
    def settle_s(self) -> float:
        return self.duration_s * _SETTLE_SHARE


def press(
    pressure: Pressure,
    source: PromptSource,
    sizes: Sizes,
    clients: int,
    objectives: Objectives,
) -> Measurement:
    """Put the load of `clients` on pools of `sizes` and return what came of it."""
    replayed, window = asyncio.run(_load(pressure, source, clients))
    return measured(sizes, clients, replayed, window, objectives, pressure.quantile)


async def _load(
    pressure: Pressure, source: PromptSource, clients: int
) -> tuple[list[Replayed], tuple[float, float]]:
    """Return every request and the window they are measured in, on the monotonic clock."""
    replayed: list[Replayed] = []
    started_at = time.monotonic()
    window = (
        started_at + pressure.settle_s,
        started_at + pressure.settle_s + pressure.duration_s,
    )
    limits = httpx.Limits(max_connections=clients)
    timeout = httpx.Timeout(_REQUEST_TIMEOUT_S)
    async with httpx.AsyncClient(
        base_url=pressure.url, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        # All within the first half: the last one needs time too.
        apart_s = pressure.settle_s / 2 / clients
        tasks = [
            asyncio.create_task(_client(http, pressure, source, index * apart_s, replayed))
            for index in range(clients)
        ]
        await asyncio.sleep(window[1] - time.monotonic())
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end
    return replayed, window


async def _client(
    http: httpx.AsyncClient,
    pressure: Pressure,
    source: PromptSource,
    delay_s: float,
    replayed: list[Replayed],
) -> None:
    await asyncio.sleep(delay_s)
    while True:
        prompt = source.prompt(pressure.input_tokens)
        request = Replayed(pressure.input_tokens, pressure.output_tokens, time.monotonic())
        replayed.append(request)
        try:
            await stream(http, pressure.model, prompt, request)
            request.error = request.fault
        except (httpx.HTTPError, ValueError, KeyError) as error:
            request.error = f"{type(error).__name__}: {error}"
        request.is_over = True
        if request.error is not None:
            # Whoever is refused at once must not make a storm of it.
            await asyncio.sleep(_AFTER_FAILURE_S)


def measured(
    sizes: Sizes,
    clients: int,
    replayed: Sequence[Replayed],
    window: tuple[float, float],
    objectives: Objectives,
    quantile: float,
) -> Measurement:
    """Return what the requests say about the window.

    Waits that the window's end cut off count once they are over the objective: of those that
    are waited for longest nothing has been seen yet.
    """
    begin, end = window
    waits = [_first_wait(request, window, objectives.ttft_s) for request in replayed]
    gaps = [gap for request in replayed for gap in _gaps(request, window, objectives.tbt_s)]
    tokens = sum(_tokens_by(each, end) - _tokens_by(each, begin) for each in replayed)
    return Measurement(
        sizes,
        clients,
        tokens / (end - begin),
        _quantile([wait for wait in waits if wait is not None], quantile),
        _quantile(gaps, quantile),
        sum(request.error is not None for request in replayed),
    )


def _first_wait(request: Replayed, window: tuple[float, float], objective_s: float) -> float | None:
    begin, end = window
    if request.token_times and request.token_times[0] <= end:
        return request.ttft_s if request.token_times[0] >= begin else None
    waited_s = end - request.scheduled_at
    return waited_s if waited_s > objective_s and request.error is None else None


def _gaps(request: Replayed, window: tuple[float, float], objective_s: float) -> Iterator[float]:
    begin, end = window
    for earlier, later in itertools.pairwise(request.token_times):
        if begin <= later <= end:
            yield later - earlier
    if request.token_times and not request.is_over:
        waited_s = end - request.token_times[-1]
        if waited_s > objective_s:
            yield waited_s


def _tokens_by(request: Replayed, moment: float) -> int:
    index = bisect.bisect_right(request.token_times, moment)
    return request.token_counts[index - 1] if index else 0


def _quantile(values: Sequence[float], quantile: float) -> float:
    return percentile(values, 100 * quantile) if values else math.inf
