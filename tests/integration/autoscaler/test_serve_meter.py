"""The engine meter against the classes through which vLLM reports its statistics."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from autoscaler.serve_meter import EngineTokenMeter


class Server:
    """As `ray.llm`'s: `start` brings up an engine that keeps its client in `_engine_client`."""

    statistics: Any

    async def start(self) -> None:
        self.engine = SimpleNamespace(
            _engine_client=SimpleNamespace(logger_manager=self.statistics)
        )


class MeteredServer(EngineTokenMeter, Server):
    """The meter comes first, so its `start` runs around the server's."""


async def test_vllm_reports_every_step_to_it() -> None:
    server = MeteredServer()
    # Its constructor wants an engine's configuration, for loggers that do not matter here.
    server.statistics = StatLoggerManager.__new__(StatLoggerManager)
    server.statistics.stat_loggers = []
    await server.start()
    step = IterationStats()
    step.num_generation_tokens = 4
    step.prompt_token_stats.computed = 9
    step.prompt_token_stats.local_cache_hit = 16

    manager = server.statistics
    manager.log_engine_initialized()
    manager.record(SchedulerStats(), step, None, engine_idx=0)
    manager.record(SchedulerStats(), None, None, engine_idx=1)
    manager.record(None, step)
    manager.record_sleep_state(1, 1)
    manager.record_admission_rejection("full")
    manager.log()

    assert list(server.record_autoscaling_stats().values()) == [8.0, 18.0]
