"""The simulated engine: a timing model with real sockets, real hand-offs and no model.

It computes nothing, but it cannot fake a hand-off: a prompt's KV blocks hold digests of the
prompt, and the tokens it generates are digests of the blocks it finds and of the first token, so
wrong blocks or another first token give wrong tokens. Imports neither torch nor vLLM.
"""

import asyncio
import hashlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from cluster.config import SimulatedSection
from cluster.engine import (
    EndedPull,
    EngineFacts,
    EngineLoad,
    EngineOutput,
    EngineRequest,
    HandoffPort,
    top_holders,
)
from cluster.errors import ConfigError
from cluster.messages import Holder, Offer, PrefillStats, Receipt
from cluster.names import FinishReason, HandoffId, RequestId, WorkerId

_POLL_S = 0.001


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What the timing model needs to know of the model it stands for."""

    name: str
    vocab_size: int
    max_model_len: int
    block_size: int
    chunk_tokens: int
    max_num_seqs: int


@dataclass(slots=True)
class _Sequence:
    """One request in the engine. `num_computed` counts prompt tokens whose KV is in place.

    `key` names it to the port: an aborted one of its name may not have ended there yet.
    """

    key: str
    request: EngineRequest
    max_tokens: int
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_transferred: int = 0
    num_generated: int = 0
    num_written: int = 0
    first_token: int | None = None
    state: bytes = b""
    receipt: Receipt | None = None
    is_aborted: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_to_pull(self) -> int:
        """The token before the one to sample is always computed by the engine that samples."""
        has_first = self.request.first_token is not None or self.request.awaits_token
        return self.num_prompt - (not has_first)

    @property
    def num_to_digest(self) -> int:
        """Tokens whose blocks the first token is made of, whichever engine makes it."""
        return self.num_prompt - 1

    @property
    def is_held(self) -> bool:
        """Whether its KV cache is handed on: not if the one token it makes is all it wants."""
        return self.request.produce is not None and self.max_tokens > 1


def block_content(prompt: Sequence[int], end: int, size: int) -> bytes:
    """Return the KV of the block that ends before token `end`: a digest of all before it."""
    prefix = ",".join(map(str, prompt[:end])).encode()
    return hashlib.shake_128(prefix).digest(size)


class SimulatedEngine:
    """Continuous batching, chunked prefill, a block pool and hand-offs, on an asyncio loop."""

    def __init__(
        self,
        worker_id: WorkerId,
        model: SimulatedModel,
        section: SimulatedSection,
        lease_s: float,
        port: HandoffPort,
        epoch: int | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._model = model
        self._section = section
        self._lease_s = lease_s
        self._port = port
        self._epoch = secrets.randbits(63) if epoch is None else epoch
        # Block 0 stays unused, as vLLM's null block does.
        self._free = list(range(section.num_blocks - 1, 0, -1))
        self._waiting: deque[_Sequence] = deque()
        self._pulling: dict[str, _Sequence] = {}
        self._num_submitted = 0
        self._running: list[_Sequence] = []
        self._held: dict[str, tuple[HandoffId, list[int], float]] = {}
        self._outbox: list[EngineOutput] = []
        self._work = asyncio.Event()

    def __repr__(self) -> str:
        counts = f"waiting={len(self._waiting)} running={len(self._running)}"
        return f"<SimulatedEngine {counts} free={len(self._free)} held={len(self._held)}>"

    async def start(self) -> EngineFacts:
        needed = self._num_blocks(self._model.max_model_len + 1)
        if needed >= self._section.num_blocks:
            # A request that never fits would keep all behind it waiting.
            reason = f"simulated.num_blocks {self._section.num_blocks}: a request of"
            raise ConfigError(f"{reason} {self._model.max_model_len} tokens takes {needed}")
        return EngineFacts(
            model=self._model.name,
            block_size=self._model.block_size,
            num_blocks=self._section.num_blocks,
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.vocab_size,
            epoch=self._epoch,
            layout=self._port.layout,
            is_simulated=True,
        )

    async def submit(self, request: EngineRequest) -> None:
        asked = request.sampling.get("max_tokens", 16)
        max_tokens = asked if isinstance(asked, int) else 16
        room = self._model.max_model_len - len(request.prompt_token_ids)
        # A producer makes one token of its own, however many there will be.
        limit = max_tokens if request.produce is not None else min(max_tokens, room)
        self._num_submitted += 1
        key = f"{request.request_id}/{self._num_submitted}"
        sequence = _Sequence(key, request, max(1, limit), first_token=request.first_token)
        if request.consume is not None:
            self._port.announce(request.consume)
        self._waiting.append(sequence)
        self._work.set()

    async def outputs(self) -> AsyncIterator[Sequence[EngineOutput]]:
        """Run the engine: one batch of news per step; idle without work."""
        while True:
            self._settle()
            self._admit()
            batch, step_s = self._step()
            await asyncio.sleep(step_s)
            self._grow()
            produced = [self._advance(sequence) for sequence in batch]
            outputs, self._outbox = self._outbox + [o for o in produced if o is not None], []
            if outputs:
                yield outputs
            if not (self._running or self._waiting or self._pulling or self._held):
                self._work.clear()
                await self._work.wait()

    async def abort(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            self._abort(request_id)

    def _abort(self, request_id: RequestId) -> None:
        # What is known of it may not have been said yet.
        self._outbox = [output for output in self._outbox if output.request_id != request_id]
        for key, sequence in self._pulling.items():
            if sequence.request.request_id == request_id:
                # Its blocks are being written: they are free when the pull says it has ended.
                sequence.is_aborted = True
                self._port.cancel(key)
        for sequence in [*self._waiting, *self._running]:
            if sequence.request.request_id == request_id:
                sequence.is_aborted = True
                self._drop(sequence)

    def _drop(self, sequence: _Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            if sequence.request.consume is not None:
                self._port.give_up(sequence.request.consume)
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.is_held and sequence.request.produce is not None:
                # Somebody may be reading them: they are free when the port says so.
                self._hold_for(sequence, sequence.block_ids)
                self._port.abandon(sequence.key, sequence.request.produce)
                return
        self._release_blocks(sequence.block_ids)
        sequence.block_ids = []

    async def release(self, handoff_ids: Sequence[HandoffId]) -> None:
        for handoff_id in handoff_ids:
            self._port.drop(handoff_id)

    async def load(self) -> EngineLoad:
        now = time.monotonic()
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._pulling),
            num_blocks=self._section.num_blocks,
            num_free_blocks=len(self._free),
            num_held_blocks=sum(len(ids) for _, ids, _ in self._held.values()),
            num_held_handoffs=len(self._held),
            counts=dict(self._port.totals()),
            holders=top_holders(
                Holder(name, len(ids), now - since) for name, ids, since in self._held.values()
            ),
        )

    async def stop(self) -> None:
        self._port.close()

    # Blocks.

    def _settle(self) -> None:
        """Take in what the KV plane ended since the last step."""
        for key in self._port.take_freed():
            self._release_blocks(self._held.pop(key)[1])
        for ended in self._port.take_pulls():
            self._end_pull(ended)

    def _end_pull(self, ended: EndedPull) -> None:
        sequence = self._pulling.pop(ended.key)
        if sequence.is_aborted or ended.failure is not None:
            self._release_blocks(sequence.block_ids)
        if sequence.is_aborted:
            return
        if ended.failure is not None:
            self._outbox.append(
                EngineOutput(
                    sequence.request.request_id,
                    finish_reason=FinishReason.ERROR,
                    handoff_error=ended.failure,
                )
            )
            return
        sequence.receipt = ended.receipt
        if ended.first_token is not None:
            sequence.first_token = ended.first_token
        sequence.num_computed = sequence.num_transferred = sequence.num_to_pull
        self._running.append(sequence)

    def _admit(self) -> None:
        """Start waiting requests in order while blocks and batch slots last."""
        while self._waiting:
            sequence = self._waiting[0]
            num_new = 1 if sequence.request.produce is not None else sequence.max_tokens
            needed = self._num_blocks(sequence.num_prompt + num_new)
            is_full = len(self._running) + len(self._pulling) >= self._model.max_num_seqs
            if needed > len(self._free) or is_full:
                return
            self._waiting.popleft()
            sequence.block_ids = [self._free.pop() for _ in range(needed)]
            self._begin(sequence)

    def _begin(self, sequence: _Sequence) -> None:
        offer = sequence.request.consume
        if offer is None or sequence.num_to_pull == 0:
            if offer is not None:
                self._port.give_up(offer)
            self._running.append(sequence)
            self._open(sequence)
            return
        self._pulling[sequence.key] = sequence
        pulled = sequence.block_ids[: self._num_blocks(sequence.num_to_pull)]
        self._port.pull(sequence.key, offer, pulled, sequence.request.awaits_token)

    def _open(self, sequence: _Sequence) -> None:
        """Let a producing sequence's blocks be pulled as they come."""
        request = sequence.request
        if sequence.is_held and request.produce is not None:
            self._port.open(sequence.key, request.produce)
            offer = self._offer(sequence, request.produce)
            self._outbox.append(EngineOutput(request.request_id, offer=offer))

    def _release_blocks(self, block_ids: Sequence[int]) -> None:
        self._free.extend(block_ids)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._model.block_size)

    # Steps.

    def _step(self) -> tuple[list[_Sequence], float]:
        """Choose this step's batch: every decode, and prompt tokens up to the chunk."""
        budget = self._model.chunk_tokens
        batch, num_chunk, num_decodes = [], 0, 0
        for sequence in self._running:
            if sequence.num_computed < sequence.num_to_pull:
                chunk = min(budget - num_chunk, sequence.num_to_pull - sequence.num_computed)
                sequence.num_computed += chunk
                num_chunk += chunk
            else:
                num_decodes += 1
                batch.append(sequence)
        step_s = num_chunk / self._section.prefill_tokens_per_s
        if num_decodes:
            step_s += self._section.decode_step_s
            step_s += num_decodes * self._section.decode_step_per_request_s
        return batch, step_s or _POLL_S

    def _advance(self, sequence: _Sequence) -> EngineOutput | None:
        """Generate one token of a sequence that was not aborted during the step."""
        if sequence.is_aborted:
            return None
        stats = None
        if not sequence.state:
            self._write_blocks(sequence, self._num_blocks(sequence.num_prompt))
            sequence.state = self._digest_blocks(sequence)
            stats = self._stats(sequence)
            if sequence.first_token is not None:
                self._take_in(sequence, sequence.first_token)
        token = self._token(sequence)
        self._take_in(sequence, token)
        if sequence.num_generated < sequence.max_tokens and sequence.request.produce is None:
            return EngineOutput(
                sequence.request.request_id, (token,), stats=stats, receipt=self._receipt(sequence)
            )
        return self._finish(sequence, token, stats)

    def _finish(self, sequence: _Sequence, token: int, stats: PrefillStats | None) -> EngineOutput:
        self._running.remove(sequence)
        offer = self._hold(sequence, token) if sequence.is_held else None
        if offer is None:
            self._release_blocks(sequence.block_ids)
        return EngineOutput(
            request_id=sequence.request.request_id,
            token_ids=(token,),
            finish_reason=FinishReason.LENGTH,
            stats=stats,
            offer=offer,
            receipt=self._receipt(sequence),
        )

    def _hold(self, sequence: _Sequence, first_token: int) -> Offer:
        assert sequence.request.produce is not None
        handoff_id = sequence.request.produce
        num_held = self._num_blocks(sequence.num_prompt)
        held, spare = sequence.block_ids[:num_held], sequence.block_ids[num_held:]
        self._release_blocks(spare)
        self._hold_for(sequence, held)
        self._port.hold(sequence.key, handoff_id, held, first_token)
        return self._offer(sequence, handoff_id)

    def _hold_for(self, sequence: _Sequence, block_ids: list[int]) -> None:
        """Keep blocks until the port says that nobody reads them any more."""
        assert sequence.request.produce is not None
        self._held[sequence.key] = (sequence.request.produce, block_ids, time.monotonic())

    def _offer(self, sequence: _Sequence, handoff_id: HandoffId) -> Offer:
        return Offer(
            handoff_id,
            self._worker_id,
            self._epoch,
            self._port.layout.fingerprint,
            self._port.endpoints,
            sequence.num_prompt,
            self._num_blocks(sequence.num_prompt),
            self._lease_s,
            self._model.block_size,
        )

    def _grow(self) -> None:
        """Let the whole blocks that the step has computed of prompts be pulled."""
        for sequence in self._running:
            produce, num_before = sequence.request.produce, sequence.num_written
            if produce is None or not sequence.is_held:
                continue
            self._write_blocks(sequence, sequence.num_computed // self._model.block_size)
            grown = sequence.block_ids[num_before : sequence.num_written]
            if grown:
                self._port.grow(produce, grown)

    def _write_blocks(self, sequence: _Sequence, num_blocks: int) -> None:
        """Fill the first blocks of a prompt computed here; pulled ones are left as they came."""
        if sequence.num_transferred:
            return
        prompt, size = sequence.request.prompt_token_ids, self._model.block_size
        for index in range(sequence.num_written, num_blocks):
            end = min((index + 1) * size, sequence.num_prompt)
            content = block_content(prompt, end, self._section.block_bytes)
            self._port.write(sequence.block_ids[index], content)
        sequence.num_written = max(sequence.num_written, num_blocks)

    def _digest_blocks(self, sequence: _Sequence) -> bytes:
        digest = hashlib.sha256()
        for block_id in sequence.block_ids[: self._num_blocks(sequence.num_to_digest)]:
            digest.update(self._port.read(block_id))
        digest.update(str(sequence.request.prompt_token_ids[-1]).encode())
        return digest.digest()

    def _take_in(self, sequence: _Sequence, token: int) -> None:
        """Go on from `token`: what follows the first one depends on it."""
        if sequence.num_generated == 0:
            sequence.state = hashlib.sha256(sequence.state + str(token).encode()).digest()
        sequence.num_generated += 1

    def _token(self, sequence: _Sequence) -> int:
        """Return the next token; the lowest quarter of ids is left out: specials and bytes."""
        text = sequence.state + sequence.num_generated.to_bytes(4, "little")
        lowest = self._model.vocab_size // 4
        number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        return lowest + number % (self._model.vocab_size - lowest)

    def _stats(self, sequence: _Sequence) -> PrefillStats:
        return PrefillStats(
            num_prompt_tokens=sequence.num_prompt,
            num_computed_tokens=sequence.num_prompt - sequence.num_transferred,
            num_local_cached_tokens=0,
            num_transferred_tokens=sequence.num_transferred,
        )

    def _receipt(self, sequence: _Sequence) -> Receipt | None:
        receipt, sequence.receipt = sequence.receipt, None
        return receipt
