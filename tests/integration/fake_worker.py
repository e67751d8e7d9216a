"""A worker without an engine: real sockets, and for every request what a test has planned."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from cluster.messages import (
    Cancel,
    Decode,
    Failed,
    Heartbeat,
    Holder,
    Offer,
    Offered,
    Prefill,
    Prefilled,
    PrefillStats,
    Receipt,
    Rejected,
    RouterMessage,
    Tokens,
    WorkerMessage,
    WorkerSnapshot,
)
from cluster.names import FinishReason, RequestId, Role, WorkerId
from cluster.pairing import CacheLayout
from cluster.request_plane import WorkerSocket
from cluster.snapshot import WorkerEntry
from cluster.sockets import Sockets

KV_BYTES = 4096
BLOCK_SIZE, NUM_BLOCKS = 16, 10_000


@dataclass(frozen=True)
class Plan:
    """What becomes of one request: `num_tokens` are sent, and then comes `end`.

    Ends: `finish`, `reject`, `hang`, `abort`, `fail:engine`, `fail:handoff`, `fail:invalid`, and
    of a prompt `stop`: its first token ends the request.
    """

    end: str = "finish"
    num_tokens: int = 2
    delay_s: float = 0.0


@dataclass(eq=False)
class FakeWorker:
    """`plans` are used up in order, then `default` is; `gate` holds up every answer, but for the
    offer with which a prompt `begins` where it is set."""

    sockets: Sockets
    worker_id: WorkerId
    role: Role
    epoch: int = 1
    default: Plan = Plan()
    num_waiting: int = 0
    num_free_blocks: int = NUM_BLOCKS
    produced_bytes: int = KV_BYTES
    begins: bool = False
    layout: str = ""
    holders: tuple[Holder, ...] = ()
    plans: deque[Plan] = field(default_factory=deque)
    requests: list[Prefill | Decode] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)
    num_heartbeats: int = 0

    def __post_init__(self) -> None:
        self.socket = WorkerSocket(self.sockets, "127.0.0.1")
        self.gate = asyncio.Event()
        self.gate.set()
        self._awake = asyncio.Event()
        self._awake.set()
        self._running: dict[RequestId, asyncio.Task[None]] = {}
        self._loop = asyncio.create_task(self._serve())

    @property
    def entry(self) -> WorkerEntry:
        layout, endpoint = CacheLayout(self.layout), self.socket.endpoint
        return WorkerEntry(self.worker_id, self.role, endpoint, self.epoch, "node", layout=layout)

    @property
    def ids(self) -> list[str]:
        """The legs it was asked for."""
        return [request.request_id for request in self.requests]

    def freeze(self) -> None:
        """Answer nothing until `thaw`, like a stopped process."""
        self._awake.clear()

    def thaw(self) -> None:
        self._awake.set()

    async def die(self) -> None:
        """Go without a word, port and all."""
        tasks = [self._loop, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.socket.close()

    async def _serve(self) -> None:
        async for peer, message in self.socket.receive():
            await self._awake.wait()
            await self._handle(peer, message)

    async def _handle(self, peer: bytes, message: RouterMessage) -> None:
        if isinstance(message, Heartbeat):
            self.num_heartbeats += 1
            await self.send(peer, self._snapshot())
        elif isinstance(message, Cancel):
            self.cancelled.append(message.request_id)
            if (task := self._running.pop(message.request_id, None)) is not None:
                task.cancel()
        elif isinstance(message, Prefill | Decode):
            plan = self.plans.popleft() if self.plans else self.default
            self.requests.append(message)
            answering = self._answer(peer, message, plan)
            self._running[message.request_id] = asyncio.create_task(answering)

    async def send(self, peer: bytes, *messages: WorkerMessage) -> None:
        await self._awake.wait()
        await self.socket.send(peer, messages)

    async def _answer(self, peer: bytes, message: Prefill | Decode, plan: Plan) -> None:
        if isinstance(message, Prefill) and self.begins:
            await self.send(peer, Offered(message.request_id, self._offer(message)))
        await self.gate.wait()
        if isinstance(message, Decode):
            await self._send_tokens(peer, message, plan)
        await asyncio.sleep(plan.delay_s)
        if plan.end == "reject":
            await self.send(peer, Rejected(message.request_id, "full"))
        elif plan.end.startswith("fail:"):
            kind = plan.end.removeprefix("fail:")
            await self.send(peer, Failed(message.request_id, kind, f"planned {kind} failure"))
        elif plan.end == "stop":
            stats = PrefillStats(1, 1, 0, 0)
            await self.send(peer, Tokens(message.request_id, (0,), FinishReason.STOP, stats=stats))
        elif plan.end != "hang" and isinstance(message, Prefill):
            await self.send(peer, self._prefilled(message))

    async def _send_tokens(self, peer: bytes, message: Decode, plan: Plan) -> None:
        ends = {"finish": FinishReason.LENGTH, "abort": FinishReason.ABORT}
        num_sent = plan.num_tokens if plan.end in ("finish", "hang", "fail:late") else 0
        begin = _begin(message)
        for index in range(begin, num_sent):
            is_last = index + 1 == num_sent
            await self.send(peer, self._tokens(message, index, ends.get(plan.end), is_last))
            await asyncio.sleep(plan.delay_s)
        if plan.end == "abort":
            await self.send(peer, Tokens(message.request_id, (), FinishReason.ABORT))

    def _tokens(
        self, message: Decode, index: int, finish: FinishReason | None, is_last: bool
    ) -> Tokens:
        num_prompt = len(message.prompt_token_ids)
        is_pulled = message.offer is not None
        begin = _begin(message)
        num_computed = int(begin == 0) if is_pulled else num_prompt
        stats = PrefillStats(num_prompt, num_computed, 0, num_prompt - num_computed)
        receipt = Receipt(1, KV_BYTES, self.produced_bytes, 0.01) if is_pulled else None
        return Tokens(
            message.request_id,
            (index,),
            finish_reason=finish if is_last else None,
            stats=None if index > begin else stats,
            receipt=None if index > begin else receipt,
            num_before=index - begin,
        )

    def _prefilled(self, message: Prefill) -> Prefilled:
        num_prompt = len(message.prompt_token_ids)
        stats = PrefillStats(num_prompt, num_prompt, 0, 0)
        token = None if message.sampling is None else 0
        return Prefilled(message.request_id, self._offer(message), stats, token)

    def _offer(self, message: Prefill) -> Offer:
        name, num_prompt = message.handoff_id, len(message.prompt_token_ids)
        return Offer(name, self.worker_id, self.epoch, "f", ("tcp://kv",), num_prompt, 1, 30.0)

    def _snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            num_free_blocks=self.num_free_blocks,
            num_held_blocks=0,
            num_held_handoffs=0,
            num_requests=len(self._running),
            generated_tokens=0,
            computed_prompt_tokens=0,
            busy_s=0.0,
            counts={},
            holders=self.holders,
        )


def _begin(message: Decode) -> int:
    """Return which token is decode's first: the one after a first token known or awaited."""
    if message.awaits_token:
        return 1
    return 0 if message.first_token is None else message.first_token + 1
