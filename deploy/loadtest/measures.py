"""What a run comes to: latencies, rates, service-level figures, and what it used. Pure.

Latencies are of completed requests and count from when each was due. An inter-token latency (ITL)
is the time between two answers with tokens, as a reader sees them; time per output token (TPOT) is
its request's mean over tokens, however many came at once.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.loadtest.words import Document, Outcome, RequestRecord, Slo

PERCENTILES = (50, 90, 95, 99)

Pools = Sequence[tuple[float, int | None, int | None]]


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the run: from `begin_s` up to `end_s` after its start."""

    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of at least one value."""
    return _ranked(sorted(values), percent)


def _ranked(ordered: Sequence[float], percent: float) -> float:
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> Document | None:
    """Return mean, percentiles and maximum, None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": math.fsum(ordered) / len(ordered),
        **{f"p{percent}": _ranked(ordered, percent) for percent in PERCENTILES},
        "max": ordered[-1],
    }


def gaps_s(record: RequestRecord) -> Iterator[float]:
    """Yield the seconds between one answer with tokens and the next."""
    for earlier, later in itertools.pairwise(record.token_s):
        yield later - earlier


def scheduling(records: Sequence[RequestRecord], limit_s: float) -> Document:
    """Return how late requests left, and whether that is near enough to their times.

    Times near `limit_s` at p99 say that the client was the bottleneck, not the endpoint.
    """
    late_s = [r.sent_s - r.scheduled_s for r in records if r.sent_s is not None]
    figures = {"p50_s": 0.0, "p99_s": 0.0, "max_s": 0.0}
    if late_s:
        figures = {"p50_s": percentile(late_s, 50), "p99_s": percentile(late_s, 99)}
        figures["max_s"] = max(late_s)
    return {**figures, "limit_s": limit_s, "kept_up": figures["p99_s"] <= limit_s}


def deadlines(record: RequestRecord, ttft_s: float, tbt_s: float) -> tuple[int, int]:
    """Return how many token deadlines were missed and how many there were (Etalon).

    The first token is due `ttft_s` after the request was, each other `tbt_s` after the one before;
    time that a token comes early is slack for later ones. A token that comes after its deadline
    and the slack misses as many deadlines as fit into the wait, and the reader starts afresh from
    it, without slack. Tokens of one answer come at the same moment.
    """
    missed = total = 0
    slack_s = 0.0
    last_s, last_count = record.scheduled_s, 0
    for index, (now_s, count) in enumerate(zip(record.token_s, record.token_counts, strict=True)):
        gap_s = now_s - last_s
        due_s = ttft_s if index == 0 else tbt_s
        if gap_s <= due_s + slack_s:
            slack_s += due_s - gap_s
            total += 1
        else:
            # As many as fit, the first token's own deadline apart.
            over_s = gap_s - slack_s - (ttft_s if index == 0 else 0.0)
            skipped = (1 if index == 0 else 0) + int(over_s // tbt_s)
            missed, total, slack_s = missed + skipped, total + skipped, 0.0
        extra = count - last_count - 1
        total += extra
        slack_s += extra * tbt_s
        last_s, last_count = now_s, count
    return missed, total


def fluidity(records: Sequence[RequestRecord], slo: Slo) -> Document | None:
    """Return the fluidity index: the share of token deadlines that were met.

    `index` is over all deadlines of all requests, `mean` and `p10` are of the requests' own. None
    unless both objectives are given: they are the deadlines. A lost request has met none of the
    deadlines of the tokens that it still owed.
    """
    if slo.ttft_s is None or slo.tpot_s is None:
        return None
    pairs = []
    for record in records:
        missed, total = deadlines(record, slo.ttft_s, slo.tpot_s)
        owed = 0 if record.is_completed else record.send.output_tokens - record.received_tokens
        pairs.append((missed + max(0, owed), total + max(0, owed)))
    shares = [1 - missed / total for missed, total in pairs if total]
    if not shares:
        return None
    missed, total = (sum(column) for column in zip(*pairs, strict=True))
    return {
        "index": 1 - missed / total,
        "mean": math.fsum(shares) / len(shares),
        "p10": percentile(shares, 10),
    }


def worker_seconds(pools: Pools, span: Span) -> Document | None:
    """Return the seconds that workers stood ready in the span, by pool.

    Between two samples the pools are as the earlier one says; None without samples.
    """
    if not pools:
        return None
    used = [0.0, 0.0]
    ends = [*(sample[0] for sample in pools[1:]), math.inf]
    for number, (sample, end_s) in enumerate(zip(pools, ends, strict=True)):
        begin_s = -math.inf if number == 0 else sample[0]
        held_s = min(end_s, span.end_s) - max(begin_s, span.begin_s)
        for pool in (0, 1):
            used[pool] += max(0.0, held_s) * (sample[1 + pool] or 0)
    return {"prefill": used[0], "decode": used[1], "total": sum(used)}


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run is judged by: the objectives, and what a worker costs an hour."""

    slo: Slo
    worker_hour_price: float | None = None


def summarise(
    records: Sequence[RequestRecord], span: Span, terms: Terms, pools: Pools = ()
) -> Document:
    """Return the summary of the requests that were due in `span` (see `words`)."""
    sent = [record for record in records if record.sent_s is not None]
    good = [record for record in sent if record.is_completed]
    duration_s = max(span.duration_s, 1e-9)
    used = worker_seconds(pools, span)
    price = terms.worker_hour_price
    return {
        "requests": len(sent),
        **{
            str(outcome): sum(record.outcome is outcome for record in sent)
            for outcome in (Outcome.COMPLETED, Outcome.LOST, Outcome.TRUNCATED, Outcome.WRONG)
        },
        "duration_s": span.duration_s,
        "offered_rate": _offered_rate(sent),
        "request_rate": len(good) / duration_s,
        "output_token_rate": sum(record.received_tokens for record in sent) / duration_s,
        "prompt_token_rate": sum(record.send.prompt_tokens for record in good) / duration_s,
        "ttft_s": spread([r.ttft_s for r in good if r.ttft_s is not None]),
        "tpot_s": spread([r.tpot_s for r in good if r.tpot_s is not None]),
        "itl_s": spread([gap for record in good for gap in gaps_s(record)]),
        "e2e_s": spread([r.e2e_s for r in good if r.e2e_s is not None]),
        "normalised_s": spread([r.e2e_s / r.received_tokens for r in good if r.e2e_s is not None]),
        "slo": attainment(sent, terms.slo, duration_s),
        "fluidity": fluidity([r for r in sent if r.outcome is not Outcome.UNFINISHED], terms.slo),
        "worker_seconds": used,
        "cost": used["total"] / 3600 * price if used is not None and price is not None else None,
    }


def _offered_rate(sent: Sequence[RequestRecord]) -> float | None:
    """Return requests per second as they were due; None of fewer than two."""
    times = [record.scheduled_s for record in sent]
    span_s = max(times) - min(times) if times else 0.0
    return (len(times) - 1) / span_s if span_s > 0 else None


def attainment(records: Sequence[RequestRecord], slo: Slo, duration_s: float) -> Document:
    """Return the shares of finished requests that met the objectives, and how many a second."""
    verdicts = [slo.met_by(r) for r in records if r.outcome is not Outcome.UNFINISHED]
    count = len(verdicts)
    both = sum(ttft and tpot for ttft, tpot in verdicts)
    return {
        "attainment": both / count if count else None,
        "ttft_attainment": sum(ttft for ttft, _ in verdicts) / count if count else None,
        "tpot_attainment": sum(tpot for _, tpot in verdicts) / count if count else None,
        "goodput": both / duration_s,
    }
