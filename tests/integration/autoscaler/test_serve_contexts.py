"""The Serve policy under Ray's own wrapper, contexts and configs, with a clock that walks."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from autoscaler.ratio import Sizes
from autoscaler.recording import Recording, replay
from autoscaler.serve_meter import EngineTokenMeter, TokenMeter
from autoscaler.serve_policy import PrefillDecodePolicy
from autoscaler.serve_pools import COUNTERS, ServePools, ServeSettings, counter_at
from cluster.errors import ConfigError
from cluster.names import Role
from cluster.worker_state import WorkerState
from tests.unit.autoscaler.samples import START

PREFILL, DECODE = (DeploymentID(f"{role}:m", "app") for role in ("Prefill", "Decode"))
INGRESS = DeploymentID("OpenAiIngress", "app")
KWARGS: dict[str, Any] = {
    "prefill": "Prefill:*",
    "decode": "Decode:*",
    "autoscaler": {"target_per_worker": 100.0, "cooldown_in_s": 300.0},
}
REPORT_S, LOOK_BACK_S = 10.0, 30.0


@dataclass
class Deployment:
    """One deployment: its replicas are always what Ray was last told, unless `starting`."""

    key: DeploymentID
    target: int = 1
    starting: int = 0
    config: AutoscalingConfig = field(default_factory=lambda: options())
    state: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    series: dict[ReplicaID, list[TimeStampedValue]] = field(default_factory=dict)
    requests: float = 0.0

    @property
    def role(self) -> Role:
        return Role.PREFILL if self.key == PREFILL else Role.DECODE

    def context(self, now: float) -> AutoscalingContext:
        running = [ReplicaID(f"r{i}", self.key) for i in range(self.target - self.starting)]
        return AutoscalingContext(
            deployment_id=self.key,
            deployment_name=self.key.name,
            app_name=self.key.app_name,
            current_num_replicas=len(running),
            target_num_replicas=self.target,
            running_replicas=running,
            total_num_requests=self.requests,
            total_queued_requests=0.0,
            aggregated_metrics=None,
            raw_metrics=lambda: {
                COUNTERS[self.role]: {r: self.series[r] for r in running if r in self.series}
            },
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )

    def report(self, now: float, tps: float) -> None:
        """Every replica made its share of `tps` since, and has sent the last samples."""
        for replica in self.context(now).running_replicas:
            made = self.tokens.get(replica.unique_id, 0.0) + tps * REPORT_S / self.target
            self.tokens[replica.unique_id] = made
            points = [*self.series.get(replica, []), TimeStampedValue(now, made)]
            self.series[replica] = [p for p in points if p.timestamp > now - LOOK_BACK_S]


def options(**changes: Any) -> AutoscalingConfig:
    plain = {"min_replicas": 1, "max_replicas": 8, "upscale_delay_s": 0, "downscale_delay_s": 0}
    return AutoscalingConfig(**{**plain, **changes})


@dataclass
class App:
    """Serve's control loop around one policy, a report every tenth tick."""

    policy: Any
    prefill: Deployment = field(default_factory=lambda: Deployment(PREFILL))
    decode: Deployment = field(default_factory=lambda: Deployment(DECODE))
    others: list[Deployment] = field(default_factory=list)
    now: float = START
    prefill_tps: float = 0.0
    moves: list[tuple[float, Sizes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._wrapped = _apply_app_level_autoscaling_config(self.policy)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.prefill.target, self.decode.target)

    def run(self, seconds: float, tps: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 1.0
            if (self.now - START) % REPORT_S == 0:
                self.decode.report(self.now, tps)
                self.prefill.report(self.now, self.prefill_tps)
            self.tick()

    def tick(self) -> None:
        deployments = {each.key: each for each in (self.prefill, self.decode, *self.others)}
        contexts = {key: each.context(self.now) for key, each in deployments.items()}
        decisions, states = self._wrapped(contexts)
        before = self.sizes
        for key, each in deployments.items():
            each.state = states[key]
            each.target = decisions.get(key, each.target)
        if self.sizes != before:
            self.moves.append((self.now - START, self.sizes))


class Heard(logging.Handler):
    """Keeps what Serve's log is told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("ray.serve")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def app(**kwargs: Any) -> App:
    return App(PrefillDecodePolicy(**{**KWARGS, **kwargs}))


def test_both_deployments_move_in_the_same_tick_and_keep_the_ratio() -> None:
    scaling = app(autoscaler={**KWARGS["autoscaler"], "ratio": "1:2"})
    scaling.decode.target = 2
    scaling.run(400, tps=390.0)
    assert scaling.sizes == Sizes(2, 4)
    scaling.run(1500, tps=10.0)
    sizes = [size for _, size in scaling.moves]
    assert sizes[-1] == Sizes(1, 1)
    assert all(size.prefill == -(-size.decode // 2) for size in sizes)


def test_prompt_tokens_size_both_where_they_are_the_signal() -> None:
    scaling = app(autoscaler={**KWARGS["autoscaler"], "signal": "prefill_tps", "ratio": "2:1"})
    scaling.prefill_tps = 390.0
    scaling.run(400, tps=0.0)
    assert scaling.sizes == Sizes(4, 2)


def test_it_is_the_policy_a_record_of_which_replays(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"
    scaling = app(autoscaler={**KWARGS["autoscaler"], "decision_file": str(file)})
    scaling.run(300, tps=250.0)
    assert scaling.sizes == Sizes(3, 3)
    recording = Recording.parse(file.read_text())
    records = recording.records
    config = ServeSettings.parse(KWARGS).section((Sizes(1, 1), Sizes(8, 8)))
    assert replay(records, recording.under(config)) == [record.decision for record in records]
    assert [r.decision.final for r in records if r.decision.final != Sizes(1, 1)]


def test_the_state_is_kept_by_ray_under_the_decode_deployment() -> None:
    first = app()
    first.run(400, tps=250.0)
    assert first.decode.state["tandem"]["target"] == [3, 3]
    assert "tandem" not in first.prefill.state
    # A new instance goes on from what Ray kept: the cooldown after the scale-out holds.
    successor = App(PrefillDecodePolicy(**KWARGS), first.prefill, first.decode, now=first.now)
    successor.run(120, tps=10.0)
    assert successor.sizes == Sizes(3, 3)


def test_equal_delays_are_served_by_both_at_once() -> None:
    scaling = app()
    for each in (scaling.prefill, scaling.decode):
        each.config = options(upscale_delay_s=0.05)
    while scaling.moves == []:
        # The delay runs on Ray's own clock.
        time.sleep(0.001)
        scaling.run(1, tps=250.0)
    ((moved_at, sizes),) = scaling.moves
    undelayed = app()
    undelayed.run(moved_at, tps=250.0)
    assert sizes == Sizes(2, 2) == undelayed.moves[0][1]
    assert moved_at > undelayed.moves[0][0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"upscale_delay_s": 5}, "upscale_delay_s is 5.0 for Prefill:m and 0.0 for Decode:m"),
        ({"downscale_delay_s": 5}, "downscale_delay_s is 5.0 for Prefill:m"),
        ({"downscale_to_zero_delay_s": 5}, "downscale_to_zero_delay_s is 5.0 for Prefill:m"),
        ({"upscaling_factor": 0.5}, "upscaling_factor is 0.5 for Prefill:m: leave it out"),
        ({"downscaling_factor": 0.5}, "downscaling_factor is 0.5 for Prefill:m: leave it out"),
        ({"min_replicas": 4, "max_replicas": 4}, "no sizes within the bounds have ratio 1:1"),
    ],
)
def test_what_would_part_the_pools_is_refused_with_one_error(
    changes: dict[str, Any], fault: str, heard: Heard
) -> None:
    scaling = app()
    scaling.prefill.config = options(**changes)
    scaling.decode.config = options(max_replicas=3)
    scaling.run(200, tps=250.0)
    (said,) = heard.messages
    assert said.startswith("neither pool is scaled: ") and fault in said
    assert scaling.moves == []
    scaling.prefill.config = scaling.decode.config = options()
    scaling.run(400, tps=250.0)
    assert scaling.sizes == Sizes(3, 3)


def test_even_equal_factors_would_break_the_ratio() -> None:
    """Why they are refused: Ray counts them from the replicas that run."""
    apart = App(lambda contexts: ({PREFILL: 8, DECODE: 8}, {}))
    for each in (apart.prefill, apart.decode):
        each.target, each.config = 4, options(upscaling_factor=0.5)
    apart.prefill.starting = 3
    apart.tick()
    assert apart.sizes == Sizes(5, 6)


@pytest.mark.parametrize(
    ("kwargs", "fault"),
    [
        ({"decode": "Deocde:*"}, "decode: 'Deocde:*' names no deployment with autoscaling_config"),
        ({"decode": "*"}, "decode: '*' names more than one deployment: Decode:m, Prefill:m"),
        ({"prefill": "Decode:*"}, "prefill and decode both name Decode:m"),
        ({"prefill": ""}, 'prefill: give the name of its deployment, or a pattern as "P*"'),
        ({"decoed": "x"}, "unknown key decoed (known: prefill, decode, autoscaler)"),
        ({"autoscaler": 3}, "autoscaler: give a mapping (got 3)"),
        ({"autoscaler": {}}, "signal decode_tps needs target_per_worker"),
        ({"autoscaler": {"targt": 3}}, "unknown key autoscaler.targt"),
        ({"autoscaler": {"max_decode": 3}}, "autoscaler.max_decode: bounds are the deployment's"),
        ({"autoscaler": {"slo_ttft_s": 3}}, "autoscaler.slo_ttft_s: Serve's replicas report"),
        ({"autoscaler": {"signal": "tbt"}}, "autoscaler.signal: under Serve one of decode_tps"),
    ],
)
def test_wrong_settings_are_said_once_and_raise_nothing(
    kwargs: dict[str, Any], fault: str, heard: Heard
) -> None:
    scaling = app(**kwargs)
    scaling.run(100, tps=250.0)
    (said,) = heard.messages
    assert fault in said
    assert scaling.moves == []


def test_a_deployment_that_is_no_pool_follows_rays_own_policy() -> None:
    ingress = Deployment(INGRESS, requests=6.0, config=options(target_ongoing_requests=2))
    scaling = app()
    scaling.others.append(ingress)
    scaling.tick()
    assert ingress.target == 3
    # Also while the pools are refused.
    scaling.prefill.config = options(upscale_delay_s=5)
    ingress.requests = 8.0
    scaling.tick()
    assert ingress.target == 4


def test_replicas_that_never_report_are_named(heard: Heard) -> None:
    scaling = app()
    scaling.run(60, tps=250.0)
    silent = app()
    for _ in range(400):
        silent.now += 1.0
        silent.tick()
    (said,) = heard.messages
    assert "no serving decode worker has reported" in said
    assert silent.sizes == Sizes(1, 1)


@pytest.mark.parametrize("mode", ["advise", "off"])
def test_only_act_acts(mode: str) -> None:
    scaling = app(autoscaler={**KWARGS["autoscaler"], "mode": mode})
    scaling.run(300, tps=250.0)
    assert scaling.moves == []


def test_bounds_are_the_deployments_and_keep_the_other_pool_back() -> None:
    scaling = app()
    scaling.prefill.config = options(max_replicas=2)
    scaling.run(120, tps=700.0)
    assert scaling.sizes == Sizes(2, 2)
    # Serve's target capacity narrows them while the app runs.
    for each in (scaling.prefill, scaling.decode):
        each.config = options(max_replicas=1)
    scaling.run(40, tps=700.0)
    assert scaling.sizes == Sizes(1, 1)


def test_ray_finds_the_policy_by_its_path_and_makes_it_with_the_kwargs() -> None:
    path = "autoscaler.serve_policy:PrefillDecodePolicy"
    named = AutoscalingPolicy(policy_function=path, policy_kwargs=KWARGS)
    policy = named.get_policy()(**named.policy_kwargs)
    scaling = App(policy)
    scaling.run(400, tps=250.0)
    assert scaling.sizes == Sizes(3, 3)


def test_counters_are_read_at_one_time_though_reports_come_at_several() -> None:
    series = [TimeStampedValue(10.0, 100.0), TimeStampedValue(20.0, 200.0)]
    assert [counter_at(series, at) for at in (5.0, 10.0, 15.0, 20.0, 25.0)] == [
        100.0,
        100.0,
        150.0,
        200.0,
        200.0,
    ]
    decode = Deployment(DECODE, target=3, starting=1)
    early, late = (ReplicaID(f"r{i}", DECODE) for i in range(2))
    decode.series = {
        early: [TimeStampedValue(80.0, 0.0), TimeStampedValue(90.0, 100.0)],
        late: [TimeStampedValue(85.0, 0.0), TimeStampedValue(95.0, 100.0)],
    }
    pools = ServePools(Deployment(PREFILL).context(100.0), decode.context(100.0))
    assert pools.known_until() == 90.0
    loads = [each for each in pools.load(90.0).workers if each.role is Role.DECODE]
    assert [(each.state, each.generated_tokens, each.at) for each in loads] == [
        (WorkerState.READY, 100, 90.0),
        (WorkerState.READY, 50, 95.0),
        (WorkerState.PENDING, 0, None),
    ]
    # A replica that has fallen silent does not hold up the rest for longer than two reports.
    later = ServePools(Deployment(PREFILL).context(140.0), decode.context(140.0))
    assert later.known_until() == 140.0 - 2 * decode.config.metrics_interval_s


class FakeServer:
    """As `ray.llm`'s server: an asynchronous start that brings up an engine."""

    def __init__(self, statistics: Any) -> None:
        self._statistics = statistics

    async def start(self) -> None:
        client = SimpleNamespace(logger_manager=self._statistics)
        self.engine = SimpleNamespace(_engine_client=client)


class MeteredServer(EngineTokenMeter, FakeServer):
    """As a user would write it."""


def test_a_meter_counts_for_its_replica_alone() -> None:
    one, other = TokenMeter(), TokenMeter()
    one.count_tokens(generated=3)
    one.count_tokens(generated=2, computed_prompt=7)
    assert one.record_autoscaling_stats() == {
        "tandem_generated_tokens": 5.0,
        "tandem_computed_prompt_tokens": 7.0,
    }
    assert set(other.record_autoscaling_stats().values()) == {0.0}


async def test_an_engine_meter_counts_what_the_engine_says() -> None:
    statistics = SimpleNamespace(stat_loggers=[])
    server = MeteredServer(statistics)
    await server.start()
    (listener,) = statistics.stat_loggers
    step = SimpleNamespace(num_generation_tokens=4, prompt_token_stats=SimpleNamespace(computed=9))
    listener.record(None, step, mm_cache_stats=None, engine_idx=0)
    listener.record(None, None, mm_cache_stats=None, engine_idx=0)
    assert list(server.record_autoscaling_stats().values()) == [4.0, 9.0]


async def test_an_engine_without_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match="disable_log_stats"):
        await MeteredServer(None).start()
