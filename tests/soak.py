"""Thousands of hand-offs between processes that are killed, for clients that leave.

Five workers with simulated engines, each a process behind CURVE keys, and the router's flow in
this one. A prefill worker and two decode workers, one for each transport, live through the run,
so that whatever they do not give back adds up; another of each role is killed at random and
replaced. At intervals the load pauses: then every block of every engine must be free again, and
it is noted what the processes that live through the run have.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import zmq.asyncio

from cluster.config import RouterSection
from cluster.errors import TandemError
from cluster.keyring import Keyring
from cluster.names import RequestId, Role, RouterId
from cluster.request_plane import WorkerLink
from cluster.ring_file import RingFile, key_source
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets
from router.flow import Flow, GenerateRequest
from router.membership import Membership
from router.records import Records, RequestRecord
from tests.soak_verdict import Sample, Vitals
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[1]
ROUTER = "router"
NUM_BLOCKS, BLOCK_TOKENS = 512, 16
NUM_PROMPTS, MAX_PROMPT_TOKENS, MAX_TOKENS = 48, 320, 8
NUM_CLIENTS = 16
LEAVE_SHARE, LEAVE_WITHIN_S = 0.25, 0.12
# Killed when this share of an interval's hand-offs is done, at the latest; there is then time for
# the replacement to take part.
KILL_WITHIN = 0.4
START_LIMIT_S, INTERVAL_LIMIT_S = 60.0, 600.0
# Blocks are to be free at once; memory of a dead producer is let go of when it is missed.
BLOCKS_LIMIT_S, SEGMENTS_LIMIT_S = 5.0, 15.0
TRANSPORTS = ("shm", "tcp")
LASTING = (Role.PREFILL, Role.DECODE, Role.DECODE)
MORTAL = (Role.PREFILL, Role.DECODE)


def worker_config(transports: Sequence[str]) -> dict[str, Any]:
    """Return what a worker is told: prompts take several steps, and blocks several chunks."""
    return {
        "model": {
            "engine": "simulated",
            "max_model_len": 512,
            "block_size": BLOCK_TOKENS,
            "chunk_tokens": 64,
        },
        "simulated": {
            "num_blocks": NUM_BLOCKS,
            "block_bytes": 8192,
            "prefill_tokens_per_s": 50_000,
            "decode_step_s": 0.002,
        },
        "handoff": {"transports": transports, "chunk_bytes": 32768, "stall_timeout_s": 1.0},
    }


@dataclass(frozen=True)
class SoakPlan:
    """How many hand-offs there are between two samples, and how often that is repeated; in every
    interval `num_kills` workers are killed, one after the other, but in the first nobody is."""

    handoffs_per_sample: int
    num_samples: int
    num_kills: int = 1
    seed: int = 5


@dataclass
class Tally:
    """What became of the requests. `handoffs` are those whose KV cache arrived whole."""

    handoffs: int = 0
    transports: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    setbacks: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, record: RequestRecord) -> None:
        self.outcomes[str(record.outcome)] += 1
        for attempt in record.attempts:
            if attempt.cause is not None:
                self.setbacks[attempt.cause.value] += 1
        if record.receipt is not None and record.receipt.received_bytes:
            self.handoffs += 1
            self.transports[record.receipt.transport] += 1


@dataclass(frozen=True)
class SoakRun:
    """A run's samples and what became of its requests."""

    plan: SoakPlan
    samples: Sequence[Sample]
    tally: Tally
    seconds: float


@dataclass(frozen=True)
class WorkerProcess:
    """One worker's process, up."""

    process: "subprocess.Popen[str]"
    entry: WorkerEntry

    @property
    def name(self) -> str:
        return self.entry.worker_id

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def start_worker(name: str, role: Role, config: Mapping[str, Any], keys: str) -> WorkerProcess:
    """Start a worker's process and wait until it listens."""
    argument = {"worker_id": name, "role": role.value, "config": config, "keys": keys}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak_worker", json.dumps(argument)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"worker {name} ended with {process.wait()} before it listened"
    return WorkerProcess(process, WorkerEntry.from_document(json.loads(line)))


class Soak:
    """The router, its workers and its clients."""

    def __init__(self, plan: SoakPlan, keys: str, context: zmq.asyncio.Context) -> None:
        self.plan = plan
        self.tally = Tally()
        self._keys = keys
        self._rng = Random(plan.seed)
        section, sockets = RouterSection(), Sockets(context, key_source(keys))
        self._membership = Membership(sockets, RouterId(ROUTER), section.worker_timeout_s)
        self._flow = Flow(section, self._membership, Records(1000), on_end=self.tally.count)
        self._lasting: list[WorkerProcess] = []
        self._mortal: dict[Role, WorkerProcess] = {}
        self._num_started: Counter[Role] = Counter()
        self._num_requests = 0
        self._prompts = [
            tuple(
                self._rng.randrange(4096) for _ in range(self._rng.randrange(2, MAX_PROMPT_TOKENS))
            )
            for _ in range(NUM_PROMPTS)
        ]
        self._answers: list[list[int]] = []

    async def open(self) -> None:
        """Start all workers, and have decode compute every prompt by itself for comparison."""
        started = await asyncio.gather(*(self._start(role) for role in (*LASTING, *MORTAL)))
        self._lasting = started[: len(LASTING)]
        self._mortal = dict(zip(MORTAL, started[len(LASTING) :], strict=True))
        await self._tell()
        await until(lambda: len(self._membership.ready_workers()) == len(started), START_LIMIT_S)
        for prompt in self._prompts:
            request = self._request(prompt, {"max_tokens": MAX_TOKENS}, local_only=True)
            self._answers.append(await self._ask(request))

    async def close(self) -> None:
        self._flow.close()
        await self._membership.close()
        for worker in self._workers:
            worker.kill()

    @property
    def _workers(self) -> list[WorkerProcess]:
        return [*self._lasting, *self._mortal.values()]

    async def interval(self, num_kills: int) -> None:
        """Have the interval's number of hand-offs, with workers killed meanwhile."""
        begun, number = self.tally.handoffs, self.plan.handoffs_per_sample
        clients = [asyncio.create_task(self._client(begun + number)) for _ in range(NUM_CLIENTS)]
        kill_at = begun + self._rng.random() * KILL_WITHIN * number
        if num_kills:
            await until(lambda: self.tally.handoffs >= kill_at, INTERVAL_LIMIT_S)
        for role in self._rng.sample(MORTAL, num_kills):
            await self._replace(role)
        await asyncio.gather(*clients)

    async def rest(self) -> Sample:
        """Wait until every block is free, and look at what is there."""
        await self._tell()
        now = asyncio.get_running_loop().time()
        await until(lambda: self._is_idle(now), BLOCKS_LIMIT_S)
        await until(lambda: self._segments() <= self._segments(Role.PREFILL), SEGMENTS_LIMIT_S)
        self._flow.check_invariants()
        pids = {worker.name: worker.pid for worker in self._lasting} | {ROUTER: os.getpid()}
        return Sample(
            self.tally.handoffs,
            {name: vitals(pid) for name, pid in pids.items()},
            sum(
                NUM_BLOCKS - 1 - link.snapshot.num_free_blocks
                for link in self._links()
                if link.snapshot
            ),
            len(self._segments()),
            sum("tandem" in name for name in os.listdir("/dev/shm")),
        )

    def _segments(self, *roles: Role) -> set[str]:
        """Return the arenas that workers map, of these roles or of any."""
        mapping = [worker for worker in self._workers if worker.entry.role in (roles or MORTAL)]
        return {inode for worker in mapping for inode in arenas(worker.pid)}

    def _links(self) -> list[WorkerLink]:
        return [link for role in Role for link in self._membership.ready(role)]

    def _is_idle(self, since: float) -> bool:
        """Whether all workers have said since then that they have nothing any more."""
        links = self._links()
        return len(links) == len(self._workers) and all(
            link.snapshot is not None
            and link.snapshot_s > since
            and link.snapshot.num_requests == link.snapshot.num_held_blocks == 0
            and link.snapshot.num_free_blocks == NUM_BLOCKS - 1
            for link in links
        )

    async def _start(self, role: Role) -> WorkerProcess:
        number = self._num_started[role]
        self._num_started[role] += 1
        name = f"{role.value}-{number}"
        # Prefill workers have both, and each decode worker one of them.
        kinds = TRANSPORTS if role is Role.PREFILL else (TRANSPORTS[number % len(TRANSPORTS)],)
        config = worker_config(kinds)
        return await asyncio.to_thread(start_worker, name, role, config, self._keys)

    async def _replace(self, role: Role) -> None:
        """Kill the worker of this role that is not to last; the router hears of it at once, as the
        controller would tell it."""
        self._mortal.pop(role).kill()
        self.tally.kills[role.value] += 1
        await self._tell()
        self._mortal[role] = await self._start(role)
        await self._tell()

    async def _tell(self) -> None:
        """Give the router the list of workers; it then closes its links to those that are gone."""
        await self._membership.update([worker.entry for worker in self._workers])

    # Clients.

    async def _client(self, last: int) -> None:
        """Ask for one answer after the other; leave some before they have come."""
        while self.tally.handoffs < last:
            number = self._rng.randrange(NUM_PROMPTS)
            sampling: dict[str, object] = {"max_tokens": self._rng.randrange(2, MAX_TOKENS + 1)}
            if self._rng.random() < 0.3:
                # Decode is to sample the first token too.
                sampling["seed"] = 1
            request = self._request(self._prompts[number], sampling)
            task = asyncio.create_task(self._ask(request))
            if self._rng.random() < LEAVE_SHARE:
                await asyncio.wait([task], timeout=self._rng.random() * LEAVE_WITHIN_S)
                task.cancel()
            await self._judge(task, number, len(request.prompt_token_ids))

    async def _judge(self, task: "asyncio.Task[list[int]]", number: int, length: int) -> None:
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(answer, list):
            if answer != self._answers[number][: len(answer)] or len(answer) < 2:
                self.tally.wrong.append(f"prompt of {length} tokens: {answer}")
        elif isinstance(answer, TandemError):
            self.tally.errors[f"{type(answer).__name__}: {answer}"] += 1
        elif not isinstance(answer, asyncio.CancelledError):
            raise answer

    async def _ask(self, request: GenerateRequest) -> list[int]:
        async with aclosing(self._flow.serve(request)) as stream:
            return [token async for tokens in stream for token in tokens.token_ids]

    def _request(
        self, prompt: tuple[int, ...], sampling: Mapping[str, object], local_only: bool = False
    ) -> GenerateRequest:
        self._num_requests += 1
        name = f"r{self._num_requests}"
        return GenerateRequest(RequestId(name), name, prompt, sampling, local_only)


def vitals(pid: int) -> Vitals:
    process = psutil.Process(pid)
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    named = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", rollup, re.M)}
    pss = named["Pss_Anon"] + named["Pss_Shmem"]
    return Vitals(named["Rss"], pss, process.num_fds(), len(arenas(pid)))


def arenas(pid: int) -> set[str]:
    """Return the inodes of the shared arenas that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:tandem-kv" in line}


@asynccontextmanager
async def _opened(plan: SoakPlan) -> AsyncIterator[Soak]:
    ring, context = RingFile(Keyring.generate()), zmq.asyncio.Context()
    soak = Soak(plan, ring.path, context)
    try:
        await soak.open()
        yield soak
    finally:
        await soak.close()
        context.destroy(linger=0)
        ring.close()


async def soak(plan: SoakPlan) -> SoakRun:
    """Carry the plan out."""
    samples, began = [], time.monotonic()
    async with _opened(plan) as running:
        for number in range(plan.num_samples):
            await running.interval(plan.num_kills if number else 0)
            samples.append(await running.rest())
            print(samples[-1], flush=True)
        return SoakRun(plan, samples, running.tally, time.monotonic() - began)
