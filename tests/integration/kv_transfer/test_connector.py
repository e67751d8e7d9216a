"""When the connector's halves say and do what: at the edges of a step, and between them."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import forward_context
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from cluster.config import HandoffSection
from cluster.engine_control import Attend, HoldNow
from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from kv_transfer import connector_scheduler
from kv_transfer.connector import TandemConnector
from kv_transfer.connector_scheduler import SchedulerHalf
from kv_transfer.connector_settings import ConnectorSettings, Orders
from kv_transfer.connector_worker import WorkerHalf
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
    """Notes what it and the line beside it are told, and has no news."""

    def __init__(self, said: list[str]) -> None:
        self._said = said

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._said.append(name)

    def take_freed(self) -> list[str]:
        return []

    take_pulls = take_freed

    def totals(self) -> dict[str, int]:
        return {}


class _Computes(Exception):
    """The runner has begun the step itself."""


def test_blocks_are_settled_before_a_step_that_may_use_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step begins with other requests' use of what was preempted, and may last for seconds: what
    is finished leaves, and what is revoked is left alone, while it computes."""
    said: list[str] = []
    worker = object.__new__(WorkerHalf)
    port: Any = _Port(said)
    worker._port = worker._line = port
    worker._store = worker._report = None
    worker._last_totals = {}
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
