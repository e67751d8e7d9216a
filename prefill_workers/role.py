"""The prefill role: compute the prompt, hold its KV cache, offer it, free it when told.

A request here has two lives: computing (an abort ends it) and held (a release ends it). It
stays known until the router closes its leg, whoever has freed the blocks meanwhile.
"""

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import Decode, Failed, Prefill, Prefilled, Rejected
from cluster.names import HandoffId, RequestId
from cluster.roles import Ending, Report

_CANCELLED_KEPT = 4096


class PrefillRole:
    """What a worker does with prompts."""

    def __init__(self) -> None:
        self._computing: dict[RequestId, HandoffId] = {}
        self._held: dict[RequestId, HandoffId] = {}
        # An abort can cross the engine's finish: an offer that comes for one of these is freed.
        self._cancelled: dict[RequestId, None] = {}

    def accept(self, message: Prefill | Decode) -> EngineRequest | Rejected:
        """Return the engine's request; it is greedy and makes one token nobody reads."""
        if not isinstance(message, Prefill):
            return Rejected(message.request_id, "this worker is in the prefill role")
        self._computing[message.request_id] = message.handoff_id
        return EngineRequest(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling={},
            produce=message.handoff_id,
            cache_salt=message.cache_salt,
            priority=message.priority,
        )

    def report(self, output: EngineOutput) -> Report:
        """Offer a finished prompt; one cancelled while it finished is freed instead."""
        request_id = output.request_id
        if output.finish_reason is None:
            return Report(None)
        handoff_id = self._computing.pop(request_id, None)
        if output.offer is None or output.stats is None:
            failed = Failed(request_id, "engine", f"prefill ended with {output.finish_reason}")
            return Report(failed, is_last=True)
        if handoff_id is None or request_id in self._cancelled:
            self._cancelled.pop(request_id, None)
            return Report(None, Ending(release=(output.offer.handoff_id,)), is_last=True)
        self._held[request_id] = handoff_id
        return Report(Prefilled(request_id, output.offer, output.stats))

    def cancel(self, request_id: RequestId) -> Ending:
        """End the request in whichever of its lives it is."""
        held = self._held.pop(request_id, None)
        if held is not None:
            return Ending(release=(held,))
        if self._computing.pop(request_id, None) is None:
            return Ending()
        self._cancelled[request_id] = None
        while len(self._cancelled) > _CANCELLED_KEPT:
            del self._cancelled[next(iter(self._cancelled))]
        return Ending(abort=(request_id,))
