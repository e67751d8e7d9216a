"""When requests leave: on schedule whatever the endpoint does, or as answers come back."""

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from deploy.loadtest.client import Client
from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.timer import PreciseTimer
from deploy.loadtest.words import RequestRecord, Send, Tokenizer

_AFTER_FAILURE_S = 0.25

Observe = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A request ready to go: its bytes, and the record that its answer fills."""

    record: RequestRecord
    request: bytes


def prepare(endpoint: Endpoint, sends: Iterable[Send], tokenizer: Tokenizer | None) -> list[Job]:
    """Encode every request ahead, so that sending one costs a write."""
    return [
        Job(RequestRecord(index, send, send.at_s), endpoint.post(send, tokenizer))
        for index, send in enumerate(sends)
    ]


class OpenLoop:
    """Sends every job at its time; a session's later turns when their users would."""

    def __init__(self, client: Client, jobs: Sequence[Job], observe: Observe) -> None:
        self._client = client
        self._observe = observe
        self._num_left = len(jobs)
        self._due: list[tuple[float, int, Job]] = []
        self._later: dict[str, deque[Job]] = {}
        for job in jobs:
            session = job.record.send.session
            if session is not None and session in self._later:
                self._later[session].append(job)
            else:
                self._due.append((job.record.scheduled_s, job.record.index, job))
                if session is not None:
                    self._later[session] = deque()
        heapq.heapify(self._due)

    async def run(self) -> None:
        """Return when every answer has ended."""
        if not self._num_left:
            return
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        self._timer = PreciseTimer(loop, self._send_due)
        try:
            self._arm()
            await self._over
        finally:
            self._timer.close()

    def _arm(self) -> None:
        if self._due:
            self._timer.arm(self._client.zero + self._due[0][0])

    def _send_due(self) -> None:
        due, client = self._due, self._client
        while due and client.zero + due[0][0] <= time.monotonic():
            job = heapq.heappop(due)[2]
            client.begin(job.record, job.request, self._done)
        self._arm()

    def _done(self, record: RequestRecord) -> None:
        self._observe(record)
        self._num_left -= 1
        later = self._later.get(record.send.session) if record.send.session is not None else None
        if later:
            job = later.popleft()
            now_s = time.monotonic() - self._client.zero
            job.record.scheduled_s = max(job.record.send.at_s, now_s + job.record.send.think_s)
            heapq.heappush(self._due, (job.record.scheduled_s, job.record.index, job))
            self._arm()
        if not self._num_left and not self._over.done():
            self._over.set_result(None)


async def closed_loop(
    client: Client, jobs: Sequence[Job], concurrency: int, observe: Observe
) -> None:
    """Keep `concurrency` requests under way, or conversations where jobs have sessions.

    A request is due when the answer before it has ended and its user has thought.
    """
    conversations = iter(_conversations(jobs))

    async def user() -> None:
        for jobs in conversations:
            for number, job in enumerate(jobs):
                if number > 0 and job.record.send.think_s > 0:
                    await asyncio.sleep(job.record.send.think_s)
                job.record.scheduled_s = time.monotonic() - client.zero
                observe(await client.complete(job.record, job.request))
                if not job.record.is_completed:
                    # Whoever is refused at once must not make a storm of it.
                    await asyncio.sleep(_AFTER_FAILURE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(user())


def _conversations(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return the turns of each session, and single requests, by their first time."""
    by_session: dict[str, list[Job]] = {}
    found: list[list[Job]] = []
    for job in jobs:
        session = job.record.send.session
        if session is not None and session in by_session:
            by_session[session].append(job)
            continue
        found.append([job])
        if session is not None:
            by_session[session] = found[-1]
    return found
