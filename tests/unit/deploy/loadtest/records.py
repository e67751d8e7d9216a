"""Records of requests as tests want them."""

from collections.abc import Sequence

from deploy.loadtest.words import Outcome, RequestRecord, Send


def record(
    scheduled_s: float,
    token_s: Sequence[float],
    counts: Sequence[int] | None = None,
    outcome: Outcome = Outcome.COMPLETED,
    phase: str = "",
) -> RequestRecord:
    """Return a request whose answers came at `token_s`, a token each unless `counts` says more."""
    counts = counts or range(1, len(token_s) + 1)
    asked = counts[-1] if counts else 4
    made = RequestRecord(0, Send(scheduled_s, (1, 2, 3), asked, phase=phase), scheduled_s)
    made.sent_s, made.outcome = scheduled_s, outcome
    made.token_s, made.token_counts = list(token_s), list(counts)
    made.received_tokens = counts[-1] if counts else 0
    made.end_s = token_s[-1] if token_s else scheduled_s
    return made
