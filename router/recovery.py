"""What a request does after a setback: whom it keeps away from, and when it gives up. Pure.

A worker that is gone, failed or refused is excluded. A hand-off that failed between two living
workers says little about either, nor does a connection that was cut: they are merely avoided, so
that the only prefill worker may be tried once more. After the second such hand-off, and in the last
attempt, decode computes the prompt.
"""

import enum
from dataclasses import dataclass, replace

from cluster.config import RouterSection
from cluster.names import WorkerId
from router.policy import Placed, PlacementRequest

MAX_FAILED_HANDOFFS = 2


class Cause(enum.StrEnum):
    """Why a placement came to nothing."""

    PREFILL_REFUSED = "prefill_refused"
    PREFILL_LOST = "prefill_lost"
    PREFILL_FAILED = "prefill_failed"
    PREFILL_CUT = "prefill_cut"
    HANDOFF_FAILED = "handoff_failed"
    DECODE_REFUSED = "decode_refused"
    DECODE_LOST = "decode_lost"
    DECODE_FAILED = "decode_failed"
    DECODE_CUT = "decode_cut"


_CUTS = {Cause.PREFILL_CUT, Cause.DECODE_CUT}
_LOST_PREFILLS = {Cause.PREFILL_LOST, Cause.PREFILL_FAILED, Cause.PREFILL_CUT}
_LOST_CACHES = {Cause.HANDOFF_FAILED, *_LOST_PREFILLS}
_PREFILL_CAUSES = {Cause.PREFILL_REFUSED, *_LOST_PREFILLS}


@dataclass(frozen=True, slots=True)
class Tries:
    """A request's setbacks so far; `num_attempts` includes the one in progress."""

    num_attempts: int = 1
    num_failed_handoffs: int = 0
    excluded: frozenset[WorkerId] = frozenset()
    avoided: frozenset[WorkerId] = frozenset()

    def after(self, cause: Cause, placement: Placed) -> "Tries":
        """Return the tries with one more setback."""
        tries = replace(self, num_attempts=self.num_attempts + 1)
        decode, prefill = placement.decode_worker, placement.prefill_worker
        if cause is Cause.HANDOFF_FAILED:
            pair = {decode} | ({prefill} if prefill else set())
            num_failed = self.num_failed_handoffs + 1
            return replace(tries, num_failed_handoffs=num_failed, avoided=self.avoided | pair)
        culprit = prefill if prefill and cause in _PREFILL_CAUSES else decode
        if cause in _CUTS:
            return replace(tries, avoided=self.avoided | {culprit})
        return replace(tries, excluded=self.excluded | {culprit})

    def request(
        self, num_prompt_tokens: int, local_only: bool, config: RouterSection
    ) -> PlacementRequest:
        """Return what the policy is asked for the attempt in progress."""
        is_retry = self.num_attempts > 1
        may_compute_on_decode = is_retry and config.recovery == "elsewhere"
        is_last_resort = may_compute_on_decode and (
            self.num_failed_handoffs >= MAX_FAILED_HANDOFFS
            or self.num_attempts >= config.max_attempts
        )
        return PlacementRequest(
            num_prompt_tokens, local_only, is_last_resort, is_retry, self.excluded, self.avoided
        )


def should_retry(tries: Tries, cause: Cause, config: RouterSection) -> bool:
    """Return whether another placement is tried after `cause`, nothing having been answered.

    Without recovery a lost KV cache ends the request; a refusal or a lost decode does not.
    """
    if cause in _LOST_CACHES and config.recovery == "none":
        return False
    return tries.num_attempts < config.max_attempts
