"""A request's record as the spans of a trace: which there are, when, and what they say. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.names import Stage
from router.records import Attempt, Outcome, RequestRecord
from router.timeline import STAGE_AFTER, Event

ROOT = "router"
_NAMES = {
    Stage.QUEUED: "queue",
    Stage.PREFILL: "prefill",
    Stage.TRANSFER: "transfer",
    Stage.DECODE: "decode",
}
_FAILURES = (Outcome.REJECTED, Outcome.DEADLINE, Outcome.ERROR)

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Span:
    """Times count from the request's arrival; `error` is why it came to nothing, None if not."""

    name: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str | None = None


def spans_of(record: RequestRecord) -> tuple[Span, list[Span]]:
    """Return the root span of a request that has ended, and its children in order.

    A request that was placed again has the spans of every attempt.
    """
    end_s = record.timeline.e2e_s or 0.0
    outcome = record.outcome or Outcome.ERROR
    error = (record.error or outcome.value) if outcome in _FAILURES else None
    return Span(ROOT, 0.0, end_s, _of_request(record, outcome), error), list(_stages(record))


def _of_request(record: RequestRecord, outcome: Outcome) -> dict[str, Value]:
    timeline = record.timeline
    attributes: dict[str, Value | None] = {
        "tandem.exchange_id": record.exchange_id,
        "tandem.request_id": record.request_id,
        "tandem.outcome": outcome.value,
        "tandem.attempts": len(record.attempts),
        "tandem.prefill_worker": record.prefill_worker,
        "tandem.decode_worker": record.decode_worker,
        "tandem.ttft_s": timeline.ttft_s,
        "tandem.tpot_s": timeline.tpot_s,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.num_tokens,
    }
    return _known(attributes)


def _stages(record: RequestRecord) -> Iterator[Span]:
    num_placed = 0
    stamps = [stamp for stamp in record.timeline.stamps if stamp.event in STAGE_AFTER]
    for begun, following in pairwise(stamps):
        num_placed += begun.event is Event.PLACED
        stage = STAGE_AFTER[begun.event]
        attempt = record.attempts[num_placed - 1] if num_placed else None
        error = None
        if following.event is Event.SET_BACK and attempt is not None and attempt.cause:
            error = f"{attempt.cause.value}: {attempt.detail}"
        attributes = {} if attempt is None else _of_stage(record, stage, attempt)
        yield Span(_NAMES[stage], begun.at_s, following.at_s, attributes, error)


def _of_stage(record: RequestRecord, stage: Stage, attempt: Attempt) -> dict[str, Value]:
    placement, tokens, receipt = attempt.placement, record.prompt_tokens, record.receipt
    if stage is Stage.PREFILL:
        worker = placement.prefill_worker or placement.decode_worker
        is_local = placement.prefill_worker is None
        return {"tandem.worker": worker, "tandem.is_local": is_local}
    if stage is Stage.TRANSFER:
        return _known(
            {
                "tandem.prefill_worker": placement.prefill_worker,
                "tandem.decode_worker": placement.decode_worker,
                "tandem.bytes": receipt.received_bytes if receipt else None,
                "tandem.pull_s": receipt.transfer_s if receipt else None,
                "tandem.transferred_tokens": tokens.transferred if tokens else None,
                "tandem.reused_tokens": tokens.reused if tokens else None,
                "tandem.recomputed_tokens": tokens.recomputed if tokens else None,
            }
        )
    if stage is Stage.DECODE:
        num_tokens = record.timeline.num_tokens
        return {"tandem.worker": placement.decode_worker, "tandem.output_tokens": num_tokens}
    return {}


def _known(attributes: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: value for name, value in attributes.items() if value is not None}
