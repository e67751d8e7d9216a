"""The half of the connector beside vLLM's scheduler: which request holds, pulls, or neither.

Runs in the `EngineCore` process. Everything but the control socket runs on the scheduler's
thread.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import zmq
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import RequestStatus

from cluster.engine import top_holders
from cluster.engine_control import (
    CODEC,
    NEWS_SUFFIX,
    AskFailure,
    AskLoad,
    Attend,
    Begun,
    BlockLoad,
    DropHandoffs,
    HoldNow,
    PullFailure,
    RankLines,
    bind_locally,
)
from cluster.messages import Holder, Offer, Receipt
from cluster.names import HandoffId
from cluster.pairing import NO_LAYOUT
from cluster.process_guard import die_with_parent, end_quickly
from cluster.wire import WireError
from kv_transfer.connector_settings import (
    ConnectorSettings,
    Orders,
    PortAddress,
    WorkerReport,
    add_receipt,
)
from kv_transfer.consumer import Pull
from kv_transfer.layout import num_blocks_for
from kv_transfer.producer import Hold
from kv_transfer.progress import Progress
from kv_transfer.protocol import (
    awaits_token,
    handoff_to_produce,
    offer_to_consume,
    offered_params,
)
from kv_transfer.rank_line import NAP_S

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Whatever ends the waiting of those that only wait for hand-offs is said to the ranks, and ends
# their sleep. This bounds what sleeping costs, and being late should nobody have said so.
_SLEEP_S = 0.5
# Of these caches a full block stays as it is.
_ONE_TOKEN_ONE_PLACE = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    ChunkedLocalAttentionSpec,
)


def step_without_pause() -> None:
    """Let this process schedule at once what a step without tokens has brought.

    vLLM pauses for a millisecond after each such step, for transfer threads' sake (`EngineCoreProc.
    _process_engine_step`). Ours have their ranks sleep in the step itself until there is news, so
    the pause would only delay every pulled request by that much.
    """
    from vllm.v1.engine.core import EngineCoreProc

    def step(core: Any) -> bool:
        outputs, is_executed = core.step_fn()
        for output in (outputs or {}).items():
            core.output_queue.put_nowait(output)
        core.post_step(is_executed)
        return bool(is_executed)

    EngineCoreProc._process_engine_step = step


class SchedulerHalf:
    """Turns vLLM's scheduling callbacks into orders for the worker halves."""

    def __init__(self, settings: ConnectorSettings, kv_cache_config: "KVCacheConfig") -> None:
        die_with_parent()
        end_quickly()
        step_without_pause()
        self._settings = settings
        self._specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._block_sizes = [spec.block_size for spec in self._specs]
        self._orders = Orders()
        self._prompts: dict[str, tuple[HandoffId, Request]] = {}
        self._progress = Progress(list(map(_finished_size, kv_cache_config.kv_cache_groups)))
        self._news: zmq.Socket[bytes] | None = None
        self._lines: RankLines | None = None
        self._was_idle = False
        self._offers: dict[str, Offer] = {}
        self._awaiting: dict[str, Request] = {}
        self._unfinished: set[str] = set()
        self._pulling: set[str] = set()
        self._held: dict[str, tuple[HandoffId, int, float]] = {}
        self._receipts: dict[str, Receipt] = {}
        self._failures: dict[str, str] = {}
        self._rank_totals: dict[int, dict[str, int]] = {}
        self._totals: dict[str, int] = {}
        self._drops: deque[HandoffId] = deque()
        self._endpoints: tuple[str, ...] = ()
        self._layout = NO_LAYOUT
        self._block_pool: BlockPool | None = None
        self._is_closing = False
        self._control = threading.Thread(target=self._serve_control, daemon=True)

    def bind_block_pool(self, block_pool: "BlockPool") -> None:
        self._block_pool = block_pool

    def set_addresses(self, addresses: Mapping[int, Any]) -> None:
        """Take every rank's port address; called once, before the first request."""
        ranked: list[PortAddress] = [addresses[rank] for rank in sorted(addresses)]
        self._endpoints = tuple(address.endpoint for address in ranked)
        self._layout = ranked[0].layout
        self._lines = RankLines(self._settings.control_endpoint, len(ranked))
        self._control.start()

    def on_new_request(self, request: "Request") -> None:
        """Keep the lease of an offer alive while its request waits for local blocks."""
        key, params = request.request_id, request.kv_transfer_params
        self._unfinished.add(key)
        handoff_id, offer = handoff_to_produce(params), offer_to_consume(params)
        if handoff_id is not None:
            self._prompts[key] = handoff_id, request
        if offer is not None:
            self._offers[key] = offer
            self._orders.announced.append(offer)
            if awaits_token(params):
                self._awaiting[key] = request

    def num_tokens_to_pull(self, request: "Request", num_computed: int) -> tuple[int, bool]:
        """Return how many prompt tokens beyond `num_computed` the offer brings.

        The last token is always computed here, as its logits sample the next one: of the
        prompt, or the first token that comes with the offer.
        """
        offer = self._offers.get(request.request_id)
        if offer is None or request.num_output_tokens:
            return 0, False
        end = self._end_of_pull(request, offer)
        if end <= num_computed or not self._has_producer_kept(end, offer.num_tokens):
            return 0, False
        return end - num_computed, True

    def _has_producer_kept(self, end: int, num_tokens: int) -> bool:
        """Whether a producer whose prompt has `num_tokens` still has all that goes on from `end`
        attends to: its windows have moved on to the end of the prompt."""
        return all(
            _first_kept(spec, num_tokens) // spec.block_size
            <= _first_kept(spec, end) // spec.block_size
            for spec in self._specs
        )

    def on_blocks_allocated(
        self, request: "Request", blocks: "KVCacheBlocks", num_tokens: int
    ) -> None:
        """Order the pull, once; an offer the local cache made needless is given up."""
        offer = self._offers.pop(request.request_id, None)
        if offer is None:
            return
        if num_tokens == 0:
            self._orders.given_up.append(offer)
            return
        self._pulling.add(request.request_id)
        self._orders.pulls.append(self._pull(request, offer, blocks, num_tokens))

    def _pull(
        self, request: "Request", offer: Offer, blocks: "KVCacheBlocks", num_tokens: int
    ) -> Pull:
        end = self._end_of_pull(request, offer)
        num_present = end - num_tokens
        ids = blocks.get_block_ids()
        block_ids = tuple(
            tuple(group[: num_blocks_for(end, size)])
            for group, size in zip(ids, self._block_sizes, strict=True)
        )
        first_blocks = tuple(num_present // size for size in self._block_sizes)
        is_awaiting = request.request_id in self._awaiting
        return Pull(request.request_id, offer, block_ids, first_blocks, is_awaiting)

    def _end_of_pull(self, request: "Request", offer: Offer) -> int:
        num_wanted = int(request.num_prompt_tokens) - (request.request_id not in self._awaiting)
        return min(offer.num_tokens, num_wanted)

    def take_orders(self, step: "SchedulerOutput") -> Orders:
        """Return what the worker halves are to do with this step, before it computes."""
        self._follow(step)
        is_idle = step.total_num_scheduled_tokens == 0
        if self._was_idle and not is_idle:
            # Where steps are scheduled ahead, ranks may be asleep in the one before.
            self._say(Attend())
        self._was_idle = is_idle
        self._orders.patience_s = self._patience_s() if is_idle else None
        while self._drops:
            self._orders.drops.append(self._drops.popleft())
        orders, self._orders = self._orders, Orders()
        return orders

    def _patience_s(self) -> float:
        """Return how long ranks may sleep: what is not waited for at a port, as the compilation of
        a grammar, vLLM asks after at every step."""
        return _SLEEP_S if self._unfinished <= self._pulling else NAP_S

    def _follow(self, step: "SchedulerOutput") -> None:
        """Let what earlier steps have finished of open prompts be pulled during this one."""
        for key in step.preempted_req_ids or ():
            # Its blocks may be another request's in this very step.
            if (revoked := self._progress.revoke(key)) is not None:
                self._orders.revoked.append(revoked)
        for new in step.scheduled_new_reqs:
            self._begin(new.req_id)
            self._grow(new.req_id, new.block_ids, new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for key, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            self._grow(key, blocks, num_computed)

    def _begin(self, key: str) -> None:
        """Open a prompt that is computed from now on, and tell the worker of it, once."""
        handoff_id, request = self._prompts.get(key, (None, None))
        if handoff_id is None or request is None or key in self._progress:
            return
        self._progress.begin(key, handoff_id)
        self._orders.opened.append((handoff_id, key))
        num_tokens = int(request.num_prompt_tokens)
        num_blocks = num_blocks_for(num_tokens, self._block_sizes[0])
        self._tell(Begun(key, self._offer(handoff_id, num_tokens, num_blocks)))

    def _grow(self, key: str, blocks: tuple[list[int], ...] | None, num_computed: int) -> None:
        growth = self._progress.step(key, blocks, num_computed)
        if growth is not None:
            self._orders.grown.append(growth)

    def _say(self, message: Attend | HoldNow) -> None:
        assert self._lines is not None, "ranks are known before the first request"
        self._lines.send(message)

    def _tell(self, begun: Begun) -> None:
        if self._news is None:
            self._news = zmq.Context.instance().socket(zmq.PUSH)
            self._news.setsockopt(zmq.LINGER, 0)
            self._news.setsockopt(zmq.SNDHWM, 0)
            self._news.connect(self._settings.control_endpoint + NEWS_SUFFIX)
        self._news.send(CODEC.encode(begun))

    def on_worker_output(self, output: "KVConnectorOutput") -> None:
        """Take in which holds ended and what pulls brought."""
        for key in output.finished_sending or ():
            self._held.pop(key, None)
        report = output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._take_in(report)
        self._pulling.difference_update(output.finished_recving or ())

    def _take_in(self, report: WorkerReport) -> None:
        """Keep what will be asked for: nobody asks what a cancelled or failed pull brought.

        Ranks end a pull in different steps. vLLM fails its request with the last of them, before
        it tells what that one reports.
        """
        self._rank_totals |= report.totals
        totals: Counter[str] = Counter()
        for counts in self._rank_totals.values():
            totals.update(counts)
        self._totals = dict(totals)
        for key, receipt in report.receipts.items():
            if key in report.failures:
                if key in self._pulling:
                    self._failures.setdefault(key, report.failures[key])
            elif key in self._unfinished:
                self._receipts[key] = add_receipt(self._receipts.get(key), receipt)
                self._go_on(key, report.tokens.get(key))

    def _go_on(self, key: str, token: int | None) -> None:
        """Put an awaited first token behind its prompt, before vLLM takes the request up again."""
        request = self._awaiting.pop(key, None)
        if request is None or token is None:
            return
        assert request.prompt_token_ids is not None, "a pulled prompt has token ids"
        request.prompt_token_ids.append(token)
        request._all_token_ids.append(token)
        request.num_prompt_tokens += 1
        request.update_block_hashes()

    def on_request_finished(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the request's blocks stay held, and what to tell the router."""
        key = request.request_id
        self._unfinished.discard(key)
        handoff_id = handoff_to_produce(request.kv_transfer_params)
        if handoff_id is not None:
            self._prompts.pop(key, None)
            opened = self._progress.end(key)
            # Its one token has stopped any other request: there is nothing to go on from.
            if request.status is RequestStatus.FINISHED_LENGTH_CAPPED:
                return True, offered_params(self._hold(request, handoff_id, block_ids))
            if opened is not None:
                self._orders.abandoned.append((opened, key))
            # Blocks that may be read are free when the port says so.
            return opened is not None, None
        self._awaiting.pop(key, None)
        unused = self._offers.pop(key, None)
        if unused is not None:
            self._orders.given_up.append(unused)
        if key in self._pulling and request.status is RequestStatus.FINISHED_ABORTED:
            self._pulling.discard(key)
            self._failures.pop(key, None)
            self._orders.cancels.append(key)
        receipt = self._receipts.pop(key, None)
        return False, {"receipt": asdict(receipt)} if receipt else None

    def _hold(
        self, request: "Request", handoff_id: HandoffId, block_ids: tuple[list[int], ...]
    ) -> Offer:
        frozen = tuple(tuple(group) for group in block_ids)
        first_token = int(request.output_token_ids[0])
        # The next step may have been scheduled already, and the one that brings this order is
        # behind it.
        self._say(HoldNow(handoff_id, request.request_id, frozen, first_token))
        self._orders.holds.append(Hold(handoff_id, request.request_id, frozen, first_token))
        num_blocks = sum(map(len, frozen))
        self._held[request.request_id] = (handoff_id, num_blocks, time.monotonic())
        return self._offer(handoff_id, int(request.num_computed_tokens), len(frozen[0]))

    def _offer(self, handoff_id: HandoffId, num_tokens: int, num_blocks: int) -> Offer:
        return Offer(
            handoff_id,
            self._settings.worker_id,
            self._settings.epoch,
            self._layout.fingerprint,
            self._endpoints,
            num_tokens,
            num_blocks,
            self._settings.handoff.lease_s,
            self._block_sizes[0],
        )

    def close(self) -> None:
        """Let the control thread end; its socket is closed there."""
        self._is_closing = True
        if self._news is not None:
            self._news.close()
        if self._lines is not None:
            self._lines.close()

    # The control socket's thread. Reads are of single attributes; orders go through a deque.

    def _serve_control(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        socket.setsockopt(zmq.RCVTIMEO, 500)
        bind_locally(socket, self._settings.control_endpoint)
        while not self._is_closing:
            try:
                request = CODEC.decode(socket.recv())
            except zmq.Again:
                continue
            except WireError:
                request = AskLoad()
            socket.send(CODEC.encode(self._answer(request)))
        socket.close()

    def _answer(self, request: object) -> BlockLoad | PullFailure:
        if isinstance(request, AskFailure):
            # Recorded before vLLM sends the error output that makes the worker ask.
            return PullFailure(self._failures.pop(request.key, None))
        if isinstance(request, DropHandoffs):
            self._drops.extend(map(HandoffId, request.handoff_ids))
        return self._load()

    def _load(self) -> BlockLoad:
        pool = self._block_pool
        held, now = list(self._held.values()), time.monotonic()
        return BlockLoad(
            pool.num_gpu_blocks if pool else 0,
            pool.get_num_free_blocks() if pool else 0,
            sum(num_blocks for _, num_blocks, _ in held),
            len(held),
            self._endpoints,
            self._layout,
            self._block_sizes[0],
            self._totals,
            top_holders(Holder(name, num, now - since) for name, num, since in held),
        )


def _finished_size(group: "KVCacheGroupSpec") -> int | None:
    """Return the tokens after which a block changes no more; a state changes with every one."""
    spec = group.kv_cache_spec
    return spec.block_size if type(spec) in _ONE_TOKEN_ONE_PLACE else None


def _first_kept(spec: "KVCacheSpec", num_computed: int) -> int:
    """Return the position of the first token that the next one attends to, as vLLM has it
    (`get_num_skipped_tokens` in `vllm/v1/core/single_type_kv_cache_manager.py`)."""
    if isinstance(spec, SlidingWindowSpec):
        return max(0, num_computed - spec.sliding_window + 1)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return num_computed - num_computed % spec.attention_chunk_size
    return 0
