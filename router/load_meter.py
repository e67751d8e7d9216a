"""What this router has seen so far, as it tells the controller: counters that only grow."""

from cluster.latency import LatencyObserver
from cluster.load import RouterLoad
from cluster.names import RouterId


class LoadMeter:
    """Counts sequences as they arrive and end, and the latencies their clients see."""

    def __init__(self) -> None:
        self._arrived = 0
        self._finished = 0
        self._failed = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._handoffs = 0
        self._handoff_bytes = 0
        self._handoff_failures = 0
        self._ttft = LatencyObserver()
        self._tbt = LatencyObserver()

    def arrive(self, num_prompt_tokens: int) -> None:
        self._arrived += 1
        self._prompt_tokens += num_prompt_tokens

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def next_tokens(self, gap_s: float) -> None:
        self._tbt.observe(gap_s)

    def hand_over(self, num_bytes: int) -> None:
        self._handoffs += 1
        self._handoff_bytes += num_bytes

    def fail_handoff(self) -> None:
        self._handoff_failures += 1

    def end(self, num_output_tokens: int, is_success: bool) -> None:
        if is_success:
            self._finished += 1
            # Of finished ones only: a cut stream says nothing of how long answers are.
            self._output_tokens += num_output_tokens
        else:
            self._failed += 1

    def load(self, router_id: RouterId, now: float) -> RouterLoad:
        """Return everything since the start; `now` is Unix time."""
        return RouterLoad(
            router_id,
            now,
            self._arrived,
            self._finished,
            self._failed,
            self._prompt_tokens,
            self._output_tokens,
            self._handoffs,
            self._handoff_bytes,
            self._handoff_failures,
            self._ttft.counts(),
            self._tbt.counts(),
        )
