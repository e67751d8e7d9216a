"""A steady load on the endpoint: clients that each keep one request open, and what they saw."""

import asyncio
import bisect
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoscaler.calibration import Measurement, Objectives
from autoscaler.ratio import Sizes
from deploy.loadtest.client import Client
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.measures import percentile
from deploy.loadtest.prompts import PromptSource
from deploy.loadtest.words import Outcome, RequestRecord, Send

_REQUEST_TIMEOUT_S = 120.0
_AFTER_FAILURE_S = 0.25
# Before the window: clients start one after the other, and queues find their length.
_SETTLE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Pressure:
    """What every client sends, and for how long it is measured; latencies at `quantile`."""

    endpoint: Endpoint
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
    records, window = asyncio.run(_load(pressure, source, clients))
    return measured(sizes, clients, records, window, objectives, pressure.quantile)


async def _load(
    pressure: Pressure, source: PromptSource, clients: int
) -> tuple[list[RequestRecord], tuple[float, float]]:
    """Return every request and the window they are measured in, in seconds after the start."""
    records: list[RequestRecord] = []
    window = (pressure.settle_s, pressure.settle_s + pressure.duration_s)
    async with Client(pressure.endpoint, _REQUEST_TIMEOUT_S) as client:
        # All within the first half: the last one needs time too.
        apart_s = pressure.settle_s / 2 / clients
        tasks = [
            asyncio.create_task(_user(client, pressure, source, index * apart_s, records))
            for index in range(clients)
        ]
        await asyncio.sleep(client.zero + window[1] - time.monotonic())
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end
    return records, window


async def _user(
    client: Client,
    pressure: Pressure,
    source: PromptSource,
    delay_s: float,
    records: list[RequestRecord],
) -> None:
    await asyncio.sleep(delay_s)
    while True:
        prompt = source.prompt(pressure.input_tokens)
        now_s = time.monotonic() - client.zero
        send = Send(now_s, prompt, pressure.output_tokens)
        record = RequestRecord(len(records), send, now_s)
        records.append(record)
        await client.complete(record, client.endpoint.post(send, None))
        if not record.is_completed:
            # Whoever is refused at once must not make a storm of it.
            await asyncio.sleep(_AFTER_FAILURE_S)


def measured(
    sizes: Sizes,
    clients: int,
    records: Sequence[RequestRecord],
    window: tuple[float, float],
    objectives: Objectives,
    quantile: float,
) -> Measurement:
    """Return what the requests say about the window.

    Waits that the window's end cut off count once they are over the objective: of those that
    are waited for longest nothing has been seen yet.
    """
    begin, end = window
    waits = [_first_wait(request, window, objectives.ttft_s) for request in records]
    gaps = [gap for request in records for gap in _gaps(request, window, objectives.tbt_s)]
    tokens = sum(_tokens_by(each, end) - _tokens_by(each, begin) for each in records)
    return Measurement(
        sizes,
        clients,
        tokens / (end - begin),
        _quantile([wait for wait in waits if wait is not None], quantile),
        _quantile(gaps, quantile),
        sum(_has_failed(request) for request in records),
    )


def _first_wait(
    request: RequestRecord, window: tuple[float, float], objective_s: float
) -> float | None:
    begin, end = window
    if request.token_s and request.token_s[0] <= end:
        return request.ttft_s if request.token_s[0] >= begin else None
    waited_s = end - request.scheduled_s
    return waited_s if waited_s > objective_s and not _has_failed(request) else None


def _has_failed(request: RequestRecord) -> bool:
    return request.outcome not in (Outcome.COMPLETED, Outcome.UNFINISHED)


def _gaps(
    request: RequestRecord, window: tuple[float, float], objective_s: float
) -> Iterator[float]:
    begin, end = window
    for earlier, later in itertools.pairwise(request.token_s):
        if begin <= later <= end:
            yield later - earlier
    if request.token_s and request.end_s is None:
        waited_s = end - request.token_s[-1]
        if waited_s > objective_s:
            yield waited_s


def _tokens_by(request: RequestRecord, moment: float) -> int:
    index = bisect.bisect_right(request.token_s, moment)
    return request.token_counts[index - 1] if index else 0


def _quantile(values: Sequence[float], quantile: float) -> float:
    return percentile(values, 100 * quantile) if values else math.inf
