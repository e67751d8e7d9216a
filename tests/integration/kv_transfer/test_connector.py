"""When the connector's halves say and do what: at the edges of a step, and between them."""

import time
from contextlib import nullcontext
from dataclasses import replace
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import forward_context
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from cluster.config import HandoffSection
from cluster.engine import EndedPull
from cluster.engine_control import AskFailure, AskLoad, Attend, BlockLoad, HoldNow, PullFailure
from cluster.messages import Offer, Receipt
from cluster.names import HandoffId, WorkerId
from kv_transfer import connector_scheduler
from kv_transfer.connector import TandemConnector
from kv_transfer.connector_scheduler import SchedulerHalf, step_without_pause
from kv_transfer.connector_settings import ConnectorSettings, Orders, WorkerReport
from kv_transfer.connector_worker import UnsupportedCache, WorkerHalf, block_rows
from kv_transfer.consumer import Pull
from kv_transfer.producer import Hold
from kv_transfer.progress import Growth
from kv_transfer.protocol import consume_params, produce_params
from kv_transfer.rank_line import NAP_S

OFFER = Offer(HandoffId("o"), WorkerId("w"), 1, "f", (), 16, 1, 1.0)
ORDERS = Orders(
    opened=[(HandoffId("new"), "r1")],
    revoked=[HandoffId("gone")],
    grown=[Growth(HandoffId("h"), ((1,),))],
    holds=[Hold(HandoffId("h"), "r2", ((1, 2),), 5)],
    abandoned=[(HandoffId("a"), "r3")],
    drops=[HandoffId("d")],
    announced=[OFFER],
    given_up=[OFFER],
    pulls=[Pull("r4", OFFER, ((3,),), (0,))],
    cancels=["r5"],
)


class _Port:
    """Notes what it and the line beside it are told; has no news but what is put in."""

    def __init__(self, said: list[str]) -> None:
        self._said = said
        self.pulls: list[EndedPull] = []
        self.counts: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._said.append(name)

    def take_freed(self) -> list[str]:
        return []

    def take_pulls(self) -> list[EndedPull]:
        pulls, self.pulls = self.pulls, []
        return pulls

    def totals(self) -> dict[str, int]:
        return self.counts


def _worker_half(port: Any, rank: int) -> WorkerHalf:
    """Return the half in a worker of this rank, at `port`; its model knows 100 tokens."""
    worker: Any = object.__new__(WorkerHalf)
    model = SimpleNamespace(get_vocab_size=lambda: 100)
    worker._vllm_config = SimpleNamespace(model_config=model)
    worker._port = worker._line = port
    worker._store = worker._report = worker._patience_s = None
    worker._rank, worker._last_totals = rank, {}
    half: WorkerHalf = worker
    return half


class _Computes(Exception):
    """The runner has begun the step itself."""


def test_blocks_are_settled_before_a_step_that_may_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step begins with other requests' use of what was preempted, and may last for seconds: what
    is finished leaves, and what is revoked is left alone, while it computes."""
    said: list[str] = []
    worker = _worker_half(_Port(said), rank=0)
    connector = object.__new__(TandemConnector)
    connector._worker, connector._connector_metadata = worker, None
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", connector)
    step = SchedulerOutput.make_empty()
    step.kv_connector_metadata = ORDERS

    def compute(_: SchedulerOutput) -> None:
        raise _Computes

    runner = object.__new__(GPUModelRunner)
    runner.execute_model_state = runner.speculative_config = None
    monkeypatch.setattr(runner, "synchronize_input_prep", nullcontext)
    monkeypatch.setattr(runner, "_update_states", compute)
    with pytest.raises(_Computes):
        runner.execute_model(step)
    assert said == ["open", "revoke", "grow", "hold", "abandon", "abort"]
    said.clear()
    monkeypatch.setattr(forward_context, "_forward_context", SimpleNamespace())
    with runner.maybe_get_kv_connector_output(step):
        said.append("compute")
    # Not before new blocks have been cleared; vLLM lets these come after the step.
    assert set(said) == {"compute", "announce", "give_up", "pull", "cancel"}


class _Lines:
    """Keeps what ranks are told."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def send(self, message: object) -> None:
        self.said.append(message)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> SchedulerHalf:
    """The half beside the scheduler, without ranks; this process does not end as an engine's."""
    for name in ("die_with_parent", "end_quickly"):
        monkeypatch.setattr(connector_scheduler, name, lambda: None)
    settings = ConnectorSettings(WorkerId("w"), 1, "ipc://@none", HandoffSection(), None)
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))]
    config: Any = SimpleNamespace(kv_cache_groups=groups)
    half = SchedulerHalf(settings, config)
    lines: Any = _Lines()
    half._lines = lines
    return half


def _request(key: str, params: dict[str, Any]) -> Any:
    return SimpleNamespace(
        request_id=key,
        kv_transfer_params=params,
        status=RequestStatus.FINISHED_LENGTH_CAPPED,
        output_token_ids=[5],
        num_computed_tokens=20,
        num_prompt_tokens=20,
    )


def _step(num_tokens: int) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.total_num_scheduled_tokens = num_tokens
    return step


def test_a_finished_prompt_is_held_before_the_next_step_is_scheduled(
    scheduler: SchedulerHalf,
) -> None:
    request = _request("r", produce_params(HandoffId("h")))
    is_held, _ = scheduler.on_request_finished(request, ([3, 4],))
    lines: Any = scheduler._lines
    assert is_held and lines.said == [HoldNow("h", "r", ((3, 4),), 5)]
    # What a rank has not heard by then is said with the step.
    assert scheduler.take_orders(_step(0)).holds == [Hold(HandoffId("h"), "r", ((3, 4),), 5)]


def test_a_step_scheduled_behind_an_idle_one_wakes_who_sleeps_in_it(
    scheduler: SchedulerHalf,
) -> None:
    lines: Any = scheduler._lines
    said = []
    for num_tokens in (0, 0, 7, 7, 0, 7):
        assert (scheduler.take_orders(_step(num_tokens)).patience_s is None) == (num_tokens > 0)
        said.append(len(lines.said))
    assert said == [0, 0, 1, 1, 1, 2]
    assert set(map(type, lines.said)) == {Attend}


def test_ranks_sleep_only_while_all_that_is_unfinished_is_pulled(scheduler: SchedulerHalf) -> None:
    """A request whose grammar is compiled, say, is asked after by vLLM itself, at every step."""
    pulled, other = (_request(key, consume_params(OFFER, False)) for key in ("a", "b"))
    patience_s = [scheduler.take_orders(_step(0)).patience_s]
    scheduler.on_new_request(pulled)
    patience_s.append(scheduler.take_orders(_step(0)).patience_s)
    blocks: Any = SimpleNamespace(get_block_ids=lambda: ([7, 8],))
    scheduler.on_blocks_allocated(pulled, blocks, 16)
    patience_s.append(scheduler.take_orders(_step(0)).patience_s)
    scheduler.on_new_request(other)
    patience_s.append(scheduler.take_orders(_step(0)).patience_s)
    scheduler.on_request_finished(other, ([],))
    patience_s.append(scheduler.take_orders(_step(0)).patience_s)
    asleep = patience_s[0]
    assert asleep is not None and asleep > 10 * NAP_S
    assert patience_s == [asleep, NAP_S, asleep, NAP_S, asleep]


CACHE: Any = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
WINDOWS = [
    (SlidingWindowSpec(**CACHE, sliding_window=64), SlidingWindowManager),
    (ChunkedLocalAttentionSpec(**CACHE, attention_chunk_size=64), ChunkedLocalAttentionManager),
]


@pytest.mark.parametrize(("spec", "manager"), WINDOWS)
def test_what_producers_windows_have_left_behind_is_not_asked_of_them(
    scheduler: SchedulerHalf, spec: Any, manager: Any
) -> None:
    """Where decode samples the first token its window is that of a token earlier: at some lengths
    it begins in a block that the producer has freed."""
    facts = SimpleNamespace(sliding_window=64, extra_retained_tokens=0, attention_chunk_size=64)
    scheduler._specs, num_kept = [spec], 0
    for num_tokens in range(2, 400):
        request = _request("r", {})
        request.num_prompt_tokens, request.num_output_tokens = num_tokens, 0
        scheduler._offers["r"] = replace(OFFER, num_tokens=num_tokens)
        scheduler._awaiting.clear()
        first, theirs = (
            manager.get_num_skipped_tokens(facts, num) // 16 for num in (num_tokens - 1, num_tokens)
        )
        wanted = (num_tokens - 1, True) if first == theirs else (0, False)
        assert scheduler.num_tokens_to_pull(request, 0) == wanted
        num_kept += first == theirs
        # With the first token both go on from the same place.
        scheduler._awaiting["r"] = request
        assert scheduler.num_tokens_to_pull(request, 0) == (num_tokens, True)
    assert 370 < num_kept < 398


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_blocks_are_found_in_any_order_of_their_numbers(order: tuple[int, ...]) -> None:
    """vLLM shows [blocks, heads, tokens, K and V] whatever lies outside in memory."""
    num_blocks = 8
    sizes = [(num_blocks, 4, 16, 64)[dim] for dim in order]
    cache = torch.zeros(sizes, dtype=torch.bfloat16).permute(order)
    assert cache.shape == (num_blocks, 4, 16, 64)
    cache[3] = torch.randn(4, 16, 64)
    (rows,) = block_rows("layer", cache, num_blocks)
    assert rows.shape == (num_blocks, 4 * 16 * 64 * 2)
    assert rows[3].any() and not rows[:3].any() and not rows[4:].any()
    rows[5] = rows[3]
    assert torch.equal(cache[5], cache[3])


def test_blocks_with_gaps_are_refused() -> None:
    with pytest.raises(UnsupportedCache, match="not of a piece"):
        block_rows("layer", torch.zeros(8, 4, 16, 64)[:, :2], 8)
    with pytest.raises(UnsupportedCache, match="not of a piece"):
        block_rows("layer", torch.zeros(8, 2, 4, 16, 64)[:, 0], 8)


@pytest.mark.parametrize(
    ("token", "is_known"),
    [(None, True), (0, True), (99, True)] + [(token, False) for token in (-1, 100, 2**40)],
)
def test_a_first_token_that_the_model_does_not_know_fails_its_pull(
    token: int | None, is_known: bool
) -> None:
    pull = EndedPull("k", None, Receipt(1, 2, 3, 0.0), token)
    checked = _worker_half(_Port([]), rank=0)._checked(pull)
    assert checked == pull if is_known else (checked.failure and checked.first_token is None)


# What ranks report. They end a pull in different steps, and only those with news say anything.

FIRST, SECOND = Receipt(2, 10, 10, 0.1, "tcp"), Receipt(2, 30, 40, 0.3, "shm")
NO_RECEIPT = Receipt(0, 0, 0, 0.0)


def _report(rank: int, num: int, *pulls: EndedPull) -> WorkerReport:
    """Return what a rank whose port has counted `num` of something says after these pulls."""
    port = _Port([])
    port.pulls, port.counts = list(pulls), {"things": num}
    worker = _worker_half(port, rank)
    worker.take_results()
    report = worker.take_receipts()
    assert report is not None and worker.take_receipts() is None
    return report


def _output(report: WorkerReport, *received: str) -> Any:
    """Return what vLLM makes of a step's reports; `received` has ended on every rank."""
    return SimpleNamespace(
        finished_sending=None, finished_recving=set(received), kv_connector_worker_meta=report
    )


def _pulling(scheduler: SchedulerHalf) -> Any:
    """Return a request whose pull is ordered."""
    request = _request("r", consume_params(OFFER, False))
    scheduler.on_new_request(request)
    blocks: Any = SimpleNamespace(get_block_ids=lambda: ([7, 8],))
    scheduler.on_blocks_allocated(request, blocks, 16)
    return request


def _finish(scheduler: SchedulerHalf, request: Any, status: RequestStatus) -> Any:
    request.status = status
    return scheduler.on_request_finished(request, ([],))[1]


def _failure(scheduler: SchedulerHalf) -> str | None:
    answer = scheduler._answer(AskFailure("r"))
    assert isinstance(answer, PullFailure)
    return answer.reason


def _keeps_nothing(scheduler: SchedulerHalf) -> bool:
    kept = (scheduler._receipts, scheduler._failures, scheduler._pulling, scheduler._unfinished)
    return not any(kept)


def test_totals_do_not_fall_in_a_step_in_which_one_rank_has_news(scheduler: SchedulerHalf) -> None:
    found = []
    for reports in ([(0, 3), (1, 5)], [(1, 6)], [(0, 4)], [(0, 5), (1, 7)]):
        report, *others = [_report(rank, num) for rank, num in reports]
        for other in others:
            report = report.aggregate(other)
        scheduler.on_worker_output(_output(report))
        load = scheduler._answer(AskLoad())
        assert isinstance(load, BlockLoad)
        found.append(load.counts["things"])
    assert found == [8, 9, 10, 12]


@pytest.mark.parametrize("is_same_step", [True, False])
def test_a_receipt_is_the_sum_over_ranks(scheduler: SchedulerHalf, is_same_step: bool) -> None:
    request = _pulling(scheduler)
    first, second = (
        _report(0, 1, EndedPull("r", None, FIRST)),
        _report(1, 1, EndedPull("r", None, SECOND)),
    )
    if is_same_step:
        scheduler.on_worker_output(_output(first.aggregate(second), "r"))
    else:
        scheduler.on_worker_output(_output(first))
        scheduler.on_worker_output(_output(second, "r"))
    params = _finish(scheduler, request, RequestStatus.FINISHED_LENGTH_CAPPED)
    assert Receipt(**params["receipt"]) == Receipt(4, 40, 50, 0.3, "shm+tcp")
    assert _keeps_nothing(scheduler)


@pytest.mark.parametrize("later", [None, "refused: ended"])
def test_a_pull_that_fails_on_one_rank_leaves_only_its_reason(
    scheduler: SchedulerHalf, later: str | None
) -> None:
    """vLLM fails the request when its last rank is done, before it says what that one reports."""
    request = _pulling(scheduler)
    scheduler.on_worker_output(_output(_report(0, 1, EndedPull("r", "no data", NO_RECEIPT))))
    assert _finish(scheduler, request, RequestStatus.FINISHED_ERROR) is None
    scheduler.on_worker_output(_output(_report(1, 1, EndedPull("r", later, SECOND)), "r"))
    assert [_failure(scheduler), _failure(scheduler)] == ["no data", None]
    assert _keeps_nothing(scheduler)


def test_a_pull_that_fails_last_on_one_rank_says_why(scheduler: SchedulerHalf) -> None:
    request = _pulling(scheduler)
    scheduler.on_worker_output(_output(_report(0, 1, EndedPull("r", None, FIRST))))
    _finish(scheduler, request, RequestStatus.FINISHED_ERROR)
    failed = _report(1, 1, EndedPull("r", "no data", NO_RECEIPT))
    scheduler.on_worker_output(_output(failed, "r"))
    assert _failure(scheduler) == "no data"
    assert _keeps_nothing(scheduler)


@pytest.mark.parametrize("failure", [None, "no data"])
def test_a_request_aborted_between_the_ends_of_its_ranks_leaves_nothing(
    scheduler: SchedulerHalf, failure: str | None
) -> None:
    request = _pulling(scheduler)
    scheduler.on_worker_output(_output(_report(0, 1, EndedPull("r", failure, FIRST))))
    _finish(scheduler, request, RequestStatus.FINISHED_ABORTED)
    ended = _report(1, 1, EndedPull("r", "cancelled", NO_RECEIPT))
    scheduler.on_worker_output(_output(ended, "r"))
    assert _keeps_nothing(scheduler)


@pytest.mark.parametrize("outputs", [{0: "what the step brought"}, {}, None])
@pytest.mark.parametrize("is_executed", [True, False])
def test_what_a_step_without_tokens_brought_is_scheduled_at_once(
    monkeypatch: pytest.MonkeyPatch, outputs: dict[int, str] | None, is_executed: bool
) -> None:
    def pause(_: float) -> None:
        raise AssertionError("the engine pauses, and a pulled request with it")

    monkeypatch.setattr(time, "sleep", pause)
    # So that vLLM's own comes back after the test.
    monkeypatch.setattr(EngineCoreProc, "_process_engine_step", None)
    step_without_pause()
    ended: list[bool] = []
    core: Any = object.__new__(EngineCoreProc)
    core.step_fn = lambda: (outputs, is_executed)
    core.output_queue, core.post_step = Queue(), ended.append
    core.scheduler = SimpleNamespace(has_requests=lambda: True)
    assert core._process_engine_step() is is_executed
    assert list(core.output_queue.queue) == list((outputs or {}).items())
    assert ended == [is_executed]
