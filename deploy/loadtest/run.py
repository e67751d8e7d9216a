"""One run of load: the client paced, watched once a second, and ended early where it must be."""

import asyncio
import gc
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import uvloop

from cluster.errors import Unavailable
from deploy.loadtest.client import Client
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.measures import percentile
from deploy.loadtest.pace import Job, OpenLoop, closed_loop
from deploy.loadtest.words import RequestRecord

_BEAT_S = 1.0
_WARM = 64
# A busy endpoint answers this late at most; pools change in seconds.
_POOLS_TIMEOUT_S = 5.0
# What the live figures look back on.
_RECENT_S = 10.0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a run goes: open loop, unless `concurrency` is given.

    It is broken off when requests have failed over `give_up_s` and nothing was answered
    meanwhile, and cut when a finished record makes `is_decided` true.
    """

    concurrency: int | None = None
    timeout_s: float = 600.0
    give_up_s: float = 10.0
    keeps_text: bool = False
    is_decided: Callable[[RequestRecord], bool] | None = None


@dataclass(frozen=True, slots=True)
class Glance:
    """The run at one moment, for whoever watches; latencies are of the last ten seconds."""

    elapsed_s: float
    planned_s: float
    num_requests: int
    num_sent: int
    num_finished: int
    num_faults: int
    num_under_way: int
    tokens_per_s: float
    requests_per_s: float
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    tpot_p50_s: float | None
    tpot_p90_s: float | None
    late_p99_s: float | None
    prefill: int | None
    decode: int | None

    def as_document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class LoadRun:
    """What came of a run; `why` says why it ended early, None if it did not."""

    records: list[RequestRecord]
    started_at: datetime
    pools: list[tuple[float, int | None, int | None]] = field(default_factory=list)
    duration_s: float = 0.0
    state: str = "complete"
    why: str | None = None


async def load(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    plan: LoadPlan,
    watch: Callable[[Glance], object],
    stop: asyncio.Event,
) -> LoadRun:
    """Send the jobs; return what came of it, also of a part if `stop` is set meanwhile.

    Raise `Unavailable` if the endpoint takes no connection to begin with.
    """
    _raise_file_limit()
    result = LoadRun([job.record for job in jobs], datetime.now(UTC))
    async with Client(endpoint, plan.timeout_s, plan.keeps_text) as client:
        await client.warm(min(_WARM, len(jobs)))
        tally = _Tally(client, jobs, result, plan)
        with _without_gc():
            client.zero = time.monotonic()
            result.started_at = datetime.now(UTC)
            if plan.concurrency is None:
                work = OpenLoop(client, jobs, tally.observe).run()
            else:
                work = closed_loop(client, jobs, plan.concurrency, tally.observe)
            await _until_over(work, client, plan, tally, watch, stop)
            result.duration_s = time.monotonic() - client.zero
    return result


async def _until_over(
    work: Coroutine[Any, Any, None],
    client: Client,
    plan: LoadPlan,
    tally: "_Tally",
    watch: Callable[[Glance], object],
    stop: asyncio.Event,
) -> None:
    run = tally.run
    pace = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    sampling = asyncio.create_task(_sample_pools(client, run))
    try:
        while not pace.done():
            await asyncio.wait(
                {pace, stopped}, timeout=_BEAT_S, return_when=asyncio.FIRST_COMPLETED
            )
            watch(tally.glance())
            since = client.failing_since
            if tally.is_decided:
                run.state = "cut"
                break
            if stop.is_set():
                run.state, run.why = "interrupted", "interrupted"
                break
            if since is not None and client.failing_s > plan.give_up_s and not pace.done():
                run.state = "broken"
                run.why = f"the endpoint has answered nothing since {since - client.zero:.1f} s"
                break
        if pace.done():
            pace.result()
    finally:
        for task in (pace, stopped, sampling):
            task.cancel()
        await asyncio.gather(pace, stopped, sampling, return_exceptions=True)


async def _sample_pools(client: Client, run: LoadRun) -> None:
    """Note the ready workers of each role once a second; end if the endpoint has no such list."""
    while True:
        began = time.monotonic()
        try:
            document = await client.read("/debug/pinned", _POOLS_TIMEOUT_S)
            roles = [each["role"] for each in document["workers"] if each["state"] == "ready"]
            run.pools.append((began - client.zero, roles.count("prefill"), roles.count("decode")))
        except Unavailable:
            pass  # the next second may say more
        except (LookupError, TypeError):
            if not run.pools:
                return  # no such page, or somebody else's of that name
        await asyncio.sleep(began + _BEAT_S - time.monotonic())


class _Tally:
    """Keeps what a glance needs as requests end, so that a glance costs little."""

    def __init__(self, client: Client, jobs: Sequence[Job], run: LoadRun, plan: LoadPlan) -> None:
        self.run = run
        self.is_decided = False
        self._decides = plan.is_decided
        self._client = client
        self._planned_s = max((job.record.scheduled_s for job in jobs), default=0.0)
        self._num_finished = 0
        self._num_faults = 0
        self._recent: deque[RequestRecord] = deque()
        self._tokens_of_finished = 0
        self._last = (0.0, 0, 0)

    def observe(self, record: RequestRecord) -> None:
        self._num_finished += 1
        self._num_faults += not record.is_completed
        self._tokens_of_finished += record.received_tokens
        self._recent.append(record)
        if self._decides is not None and self._decides(record):
            self.is_decided = True

    def glance(self) -> Glance:
        client, pools = self._client, self.run.pools
        now_s = time.monotonic() - client.zero
        tokens = self._tokens_of_finished + client.num_tokens_under_way
        last_s, last_tokens, last_finished = self._last
        passed_s = max(1e-3, now_s - last_s)
        self._last = (now_s, tokens, self._num_finished)
        while self._recent and (self._recent[0].end_s or 0.0) < now_s - _RECENT_S:
            self._recent.popleft()
        good = [record for record in self._recent if record.is_completed]
        ttfts = [record.ttft_s for record in good if record.ttft_s is not None]
        tpots = [record.tpot_s for record in good if record.tpot_s is not None]
        late = [r.sent_s - r.scheduled_s for r in self._recent if r.sent_s is not None]
        return Glance(
            elapsed_s=now_s,
            planned_s=self._planned_s,
            num_requests=len(self.run.records),
            num_sent=self._num_finished + client.num_under_way,
            num_finished=self._num_finished,
            num_faults=self._num_faults,
            num_under_way=client.num_under_way,
            tokens_per_s=(tokens - last_tokens) / passed_s,
            requests_per_s=(self._num_finished - last_finished) / passed_s,
            ttft_p50_s=_percentile(ttfts, 50),
            ttft_p90_s=_percentile(ttfts, 90),
            tpot_p50_s=_percentile(tpots, 50),
            tpot_p90_s=_percentile(tpots, 90),
            late_p99_s=_percentile(late, 99),
            prefill=pools[-1][1] if pools else None,
            decode=pools[-1][2] if pools else None,
        )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return percentile(values, percent) if values else None


def run_load(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    plan: LoadPlan,
    watch: Callable[[Glance], object],
) -> LoadRun:
    """Run `load` in a loop of its own; SIGINT and SIGTERM end it with what there is so far."""

    async def until_signalled() -> LoadRun:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await load(endpoint, jobs, plan, watch, stop)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return uvloop.run(until_signalled())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keep the collector from stopping the world for what a run leaves, which has no cycles."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _raise_file_limit() -> None:
    """An open loop holds as many connections as the endpoint leaves requests unanswered."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
