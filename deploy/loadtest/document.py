"""The document of a run: everything that was measured, as JSON; `words` says its fields."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from deploy.loadtest.endpoint import Endpoint
from deploy.loadtest.measures import Pools, Span, Terms, scheduling, summarise
from deploy.loadtest.run import LoadPlan, LoadRun
from deploy.loadtest.words import (
    FORMAT,
    Document,
    Outcome,
    RequestRecord,
    Send,
    Slo,
    WorkloadSpec,
)


@dataclass(frozen=True, slots=True)
class Question:
    """All that a run was asked, for the record."""

    spec: WorkloadSpec
    seed: int
    plan: LoadPlan
    terms: Terms
    label: str
    # At p99; a client that sends later than this measures itself.
    late_limit_s: float = 0.02
    phase_s: float | None = None
    verify: str | None = None


def with_phases(records: Sequence[RequestRecord], phase_s: float) -> list[RequestRecord]:
    """Return the records in phases of equal length by when they were due, not their workload's."""
    return [
        replace(record, send=replace(record.send, phase=name))
        for record in records
        for number in [int(record.scheduled_s // phase_s)]
        for name in [f"{number * phase_s:g}-{(number + 1) * phase_s:g} s"]
    ]


def document_of(question: Question, endpoint: Endpoint, run: LoadRun) -> Document:
    """Return the run document."""
    records, terms = run.records, question.terms
    if question.phase_s is not None:
        records = with_phases(records, question.phase_s)
    whole = Span(0.0, run.duration_s)
    return {
        "format": FORMAT,
        "label": question.label,
        "started_at": run.started_at.isoformat(timespec="milliseconds"),
        "state": run.state,
        "workload": _workload(question, [record.send for record in records]),
        "endpoint": {
            "url": endpoint.url,
            "model": endpoint.model,
            "api": endpoint.api,
            "context_tokens": endpoint.context_tokens,
        },
        "settings": _settings(question),
        "scheduling": scheduling(records, question.late_limit_s),
        "summary": summarise(records, whole, terms, run.pools),
        "phases": _phases(records, whole, terms, run.pools),
        "pools": [[round(t, 3), prefill, decode] for t, prefill, decode in run.pools],
        "faults": faults(run),
        "requests": [request_document(r, terms.slo) for r in records if r.sent_s is not None],
    }


def _workload(question: Question, sends: Sequence[Send]) -> Document:
    asked = asdict(question.spec)
    return {
        "spec": asked["text"],
        **{name: asked[name] for name in ("time_scale", "rate_scale", "length_scale")},
        "requests": len(sends),
        "duration_s": max((send.at_s for send in sends), default=0.0),
        "prompt_tokens": sum(send.prompt_tokens for send in sends),
        "output_tokens": sum(send.output_tokens for send in sends),
        "seed": question.seed,
    }


def _settings(question: Question) -> Document:
    plan, slo = question.plan, question.terms.slo
    return {
        "mode": "open" if plan.concurrency is None else "closed",
        "concurrency": plan.concurrency,
        "slo_ttft_s": slo.ttft_s,
        "slo_tpot_s": slo.tpot_s,
        "worker_hour_price": question.terms.worker_hour_price,
        "verify": question.verify,
    }


def _phases(
    records: Sequence[RequestRecord], whole: Span, terms: Terms, pools: Pools
) -> list[Document]:
    """A phase lasts from its first request to the next phase's, the last one to the end.

    Only what was sent counts: of other requests it is not known when they would have been due.
    """
    by_name: dict[str, list[RequestRecord]] = {}
    for record in records:
        if record.sent_s is not None:
            by_name.setdefault(record.send.phase, []).append(record)
    if len(by_name) < 2:
        return []
    begins = {name: min(r.scheduled_s for r in group) for name, group in by_name.items()}
    names = sorted(by_name, key=lambda name: begins[name])
    ends = [*(begins[name] for name in names[1:]), whole.end_s]
    return [
        {
            "name": name,
            "begin_s": begins[name],
            "end_s": end_s,
            "summary": summarise(by_name[name], Span(begins[name], end_s), terms, pools),
        }
        for name, end_s in zip(names, ends, strict=True)
        if begins[name] < end_s
    ]


def faults(run: LoadRun) -> list[str]:
    """Return everything that was lost, truncated or wrong, one line each."""
    lines = [
        f"request {r.index}, at {r.scheduled_s:.1f} s: {r.outcome}: {r.error}"
        for r in run.records
        if r.outcome not in (Outcome.COMPLETED, Outcome.UNFINISHED)
    ]
    return lines if run.why is None else [f"the run ended early: {run.why}", *lines]


def request_document(record: RequestRecord, slo: Slo) -> Document:
    """Return one request; times to the microsecond."""
    send = record.send
    return {
        "index": record.index,
        "phase": send.phase,
        "session": send.session,
        "turn": send.turn,
        "scheduled_s": _rounded(record.scheduled_s),
        "sent_s": _rounded(record.sent_s),
        "end_s": _rounded(record.end_s),
        "prompt_tokens": send.prompt_tokens,
        "output_tokens": send.output_tokens,
        "counted_prompt_tokens": record.counted_prompt_tokens,
        "received_tokens": record.received_tokens,
        "token_s": [round(moment, 6) for moment in record.token_s],
        "token_counts": record.token_counts,
        "ttft_s": _rounded(record.ttft_s),
        "tpot_s": _rounded(record.tpot_s),
        "e2e_s": _rounded(record.e2e_s),
        "met": all(slo.met_by(record)),
        "outcome": str(record.outcome),
        "error": record.error,
        "id": record.id,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
