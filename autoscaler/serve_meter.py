"""Mix-ins for servers under Ray Serve: they count tokens, which Ray collects from every replica.

Ray calls `record_autoscaling_stats` on a replica and hands the samples to the policy. Counters are
cumulative, so a lost report costs nothing but resolution.
"""

import threading
from typing import Any

from autoscaler.serve_pools import COMPUTED_PROMPT_TOKENS, GENERATED_TOKENS
from cluster.errors import ConfigError

_counting = threading.Lock()


class TokenMeter:
    """Put it first among a server's bases; call `count_tokens` wherever tokens come into being.

    It needs no constructor of its own, so it goes with asynchronous ones.
    """

    _generated = 0
    _computed_prompt = 0

    def count_tokens(self, *, generated: int = 0, computed_prompt: int = 0) -> None:
        """Add tokens made, and prompt tokens that no cache held; from any thread."""
        with _counting:
            self._generated += generated
            self._computed_prompt += computed_prompt

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return both counters since this replica's start."""
        return {
            GENERATED_TOKENS: float(self._generated),
            COMPUTED_PROMPT_TOKENS: float(self._computed_prompt),
        }


class EngineTokenMeter(TokenMeter):
    """The same for servers of `ray.serve.llm`: counts what vLLM's own statistics say.

    Ray offers no way in from outside to a running engine's statistics, so this reaches into
    `ray.llm` 2.60 and vLLM 0.32: a `StatLoggerManager` calls everything in its `stat_loggers`.
    """

    async def start(self) -> None:
        """Start the engine and listen to it; raise `ConfigError` if it keeps no statistics."""
        await super().start()  # type: ignore[misc]
        engine: Any = self.engine  # type: ignore[attr-defined]
        statistics = engine._engine_client.logger_manager
        if statistics is None:
            raise ConfigError("engine_kwargs.disable_log_stats hides the tokens: leave it out")
        statistics.stat_loggers.append(_StatisticsListener(self))


class _StatisticsListener:
    """What vLLM's `StatLoggerManager` expects of a stat logger for all engines of a client."""

    def __init__(self, meter: TokenMeter) -> None:
        self._meter = meter

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_more: Any) -> None:
        """Count one engine step; `iteration_stats` is None for one without output."""
        if iteration_stats is not None:
            self._meter.count_tokens(
                generated=iteration_stats.num_generation_tokens,
                computed_prompt=iteration_stats.prompt_token_stats.computed,
            )

    def log(self) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        pass

    def record_admission_rejection(self, reason: str) -> None:
        pass
