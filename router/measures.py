"""What a router exports of its requests. Label values are resolved here, once per process."""

from dataclasses import dataclass

from cluster import metrics
from router.policy import Rejection
from router.records import Outcome, PromptTokens, RequestRecord
from router.recovery import Cause
from router.timeline import Timeline

# How a request ended that says nothing of the service.
_CLIENTS_DOING = (Outcome.CANCELLED, Outcome.INVALID)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latencies promised, in seconds; None is not promised."""

    ttft_s: float | None = None
    tbt_s: float | None = None

    def met_by(self, timeline: Timeline) -> dict[str, bool]:
        """Return whether each objective, and both, were met by a request that finished."""
        met = {
            "ttft": _is_within(timeline.ttft_s, self.ttft_s),
            # One token or none has no time between tokens.
            "tbt": timeline.tpot_s is None or _is_within(timeline.tpot_s, self.tbt_s),
        }
        return {**met, "both": all(met.values())}


NO_OBJECTIVES = Objectives()


def _is_within(seconds: float | None, objective_s: float | None) -> bool:
    return objective_s is None or (seconds is not None and seconds <= objective_s)


class Measures:
    """Counts and times the requests of one flow."""

    def __init__(self, objectives: Objectives) -> None:
        self._objectives = objectives
        self._outcomes = {each: metrics.REQUESTS.labels(each.value) for each in Outcome}
        self._causes = {each: metrics.RECOVERIES.labels(each.value) for each in Cause}
        self._rejections = {each: metrics.REJECTIONS.labels(each.value) for each in Rejection}
        origins = PromptTokens().as_document()
        self._origins = {each: metrics.PROMPT_TOKENS.labels(each) for each in origins}
        self._met = {each: metrics.SLO_MET.labels(each) for each in ("ttft", "tbt", "both")}
        # Per token: not even an attribute of a module is looked up.
        self._count_tokens = metrics.OUTPUT_TOKENS.inc
        self._time_gap = metrics.ITL_SECONDS.observe

    def arrive(self, num_prompt_tokens: int) -> None:
        metrics.ARRIVED.inc()
        metrics.INPUT_TOKENS.inc(num_prompt_tokens)

    def reject(self, rejection: Rejection) -> None:
        self._rejections[rejection].inc()

    def recover(self, cause: Cause) -> None:
        self._causes[cause].inc()

    def prefilled(self, tokens: PromptTokens) -> None:
        for origin, num_tokens in tokens.as_document().items():
            self._origins[origin].inc(num_tokens)

    def handed_over(self, received_bytes: int, is_mismatch: bool) -> None:
        metrics.HANDOFF_BYTES.inc(received_bytes)
        metrics.HANDOFF_MISMATCHES.inc(is_mismatch)

    def first_tokens(self, num_tokens: int, ttft_s: float) -> None:
        self._count_tokens(num_tokens)
        metrics.TTFT_SECONDS.observe(ttft_s)

    def next_tokens(self, num_tokens: int, gap_s: float) -> None:
        self._count_tokens(num_tokens)
        self._time_gap(gap_s)

    def end(self, record: RequestRecord) -> None:
        """Take in a record whose outcome has just been set."""
        outcome, timeline = record.outcome, record.timeline
        assert outcome is not None
        self._outcomes[outcome].inc()
        for histogram, seconds in (
            (metrics.QUEUE_SECONDS, timeline.queue_s),
            (metrics.PREFILL_SECONDS, timeline.prefill_s),
            (metrics.TRANSFER_SECONDS, timeline.transfer_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        if outcome.is_success:
            self._finished(timeline)
        if outcome not in _CLIENTS_DOING:
            self._judge(outcome, timeline)

    def _finished(self, timeline: Timeline) -> None:
        if timeline.e2e_s is not None:
            metrics.E2E_SECONDS.observe(timeline.e2e_s)
        if timeline.tpot_s is not None:
            metrics.TPOT_SECONDS.observe(timeline.tpot_s)

    def _judge(self, outcome: Outcome, timeline: Timeline) -> None:
        """Hold a request against the objectives; one that failed has met none."""
        if self._objectives == NO_OBJECTIVES:
            return
        metrics.SLO_REQUESTS.inc()
        if outcome.is_success:
            for objective, is_met in self._objectives.met_by(timeline).items():
                self._met[objective].inc(is_met)
