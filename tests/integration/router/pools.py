"""Two pools of fake workers with a flow in front, for the tests of the router's core."""

import asyncio
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import zmq.asyncio

from cluster.config import RouterSection
from cluster.messages import Tokens
from cluster.names import RequestId, Role, RouterId, Stage, WorkerId
from cluster.ring_file import KeySource
from cluster.sockets import Sockets
from router.flow import Flow, GenerateRequest
from router.membership import Membership
from router.records import Records, RequestRecord
from tests.integration.fake_worker import FakeWorker
from tests.waiting import until

# Long enough that a busy machine loses nobody, for the tests that lose nobody.
PATIENT_S = 10.0
# For those that do: well under the 5 s within which a request must have moved on.
QUICK_S = 0.6
DECODE_SAMPLES = {"max_tokens": 2, "seed": 1}


class Pools:
    """Workers `p0..`, `d0..`; on leaving, nothing may be reserved, waiting or open any more."""

    def __init__(
        self,
        prefill: int = 1,
        decode: int = 1,
        timeout_s: float = PATIENT_S,
        begins: bool = False,
        keys: KeySource | None = None,
        **router: Any,
    ) -> None:
        self._begins = begins
        self._keys = keys
        self._contexts: list[zmq.asyncio.Context] = []
        self._sizes = {Role.PREFILL: prefill, Role.DECODE: decode}
        self._timeout_s = timeout_s
        self.config = RouterSection(**router)
        self.workers: dict[str, FakeWorker] = {}
        self.num_requests = 0
        self._background: list[asyncio.Task[list[Tokens]]] = []

    def __getitem__(self, name: str) -> FakeWorker:
        return self.workers[name]

    async def __aenter__(self) -> Self:
        self.context = zmq.asyncio.Context()
        sockets = Sockets(self.context, self._keys)
        self.membership = Membership(sockets, RouterId("router"), self._timeout_s)
        self.records = Records(1000)
        self.flow = Flow(self.config, self.membership, self.records)
        for role, number in self._sizes.items():
            for index in range(number):
                self.add(role, index)
        await self.refresh()
        await until(lambda: len(self.membership.ready_workers()) == len(self.workers))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if error is None:
            self.flow.check_invariants()
            await until(lambda: not self.open_legs, 2.0)
        is_empty = self.is_empty
        self.flow.close()
        await self.membership.close()
        for worker in self.workers.values():
            await worker.die()
            worker.sockets.close()
        for context in (self.context, *self._contexts):
            context.destroy(linger=0)
        assert is_empty or error is not None, self.flow

    def add(self, role: Role, index: int, epoch: int = 1) -> FakeWorker:
        name = f"{role.value[0]}{index}"
        # As in a process of its own: a context has one listener with keys.
        context = zmq.asyncio.Context() if self._keys is not None else self.context
        self._contexts.append(context)
        sockets = Sockets(context, self._keys)
        worker_id = WorkerId(name)
        self.workers[name] = FakeWorker(sockets, worker_id, role, epoch, begins=self._begins)
        return self.workers[name]

    async def refresh(self) -> None:
        """Tell the router of the workers there are, as the controller would."""
        await self.membership.update([worker.entry for worker in self.workers.values()])

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.flow.status())

    @property
    def is_empty(self) -> bool:
        return not self.status["open_reservations"] and not self.status["waiting"]

    @property
    def open_legs(self) -> int:
        return sum(worker["legs"] for worker in self.status["workers"])

    def request(self, num_tokens: int = 100, **fields: Any) -> GenerateRequest:
        """Return a request all of whose tokens are decode's to sample."""
        name = f"r{self.num_requests}"
        self.num_requests += 1
        fields.setdefault("sampling", DECODE_SAMPLES)
        prompt = tuple(range(num_tokens))
        return GenerateRequest(RequestId(name), f"x-{name}", prompt, **fields)

    async def collect(self, request: GenerateRequest | None = None) -> list[Tokens]:
        """Return everything the flow yields for `request`."""
        async with aclosing(self.flow.serve(request or self.request())) as stream:
            return [tokens async for tokens in stream]

    def start(self, request: GenerateRequest | None = None) -> "asyncio.Task[list[Tokens]]":
        return asyncio.create_task(self.collect(request))

    def start_in_background(self) -> None:
        """Serve a request that is given up, however far it is, when the test is over."""
        self._background.append(self.start())

    async def answered(self, request: GenerateRequest | None = None) -> RequestRecord:
        """Serve `request`, check that its tokens came once each, and return its record."""
        request = request or self.request()
        tokens = await self.collect(request)
        assert [entry.token_ids for entry in tokens] == [(0,), (1,)]
        return self.record(request)

    def record(self, request: GenerateRequest) -> RequestRecord:
        exchange = self.records.get(request.exchange_id)
        assert exchange is not None
        return exchange.sequences[-1]

    async def stage(self, request: GenerateRequest, stage: Stage) -> None:
        await until(lambda: self.records.get(request.exchange_id))
        await until(lambda: self.record(request).stage is stage)


def causes(record: RequestRecord) -> list[str | None]:
    return [attempt.cause and attempt.cause.value for attempt in record.attempts]


def placements(record: RequestRecord) -> list[tuple[str | None, str]]:
    return [
        (attempt.placement.prefill_worker, attempt.placement.decode_worker)
        for attempt in record.attempts
    ]
