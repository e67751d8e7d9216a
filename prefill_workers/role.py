"""The prefill role: compute the prompt, hold its KV cache, offer it, free it when told.

A request here has two lives: computing (an abort ends it) and held (a release ends it). It
stays known until the router closes its leg, whoever has freed the blocks meanwhile. One whose
first token is its last has only the first life.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import (
    FIRST_IS_LAST,
    Decode,
    Failed,
    Offered,
    Prefill,
    Prefilled,
    Rejected,
    Tokens,
)
from cluster.names import HandoffId, RequestId
from cluster.roles import Ending, Report

# For a token nobody reads. Without a seed: with one, a prompt over two steps kills vLLM's CPU
# engine. There would be a second token, so the first does not end the request.
UNREAD: Mapping[str, object] = {"temperature": 0.0, "max_tokens": 2}


@dataclass(frozen=True, slots=True)
class _Prompt:
    handoff_id: HandoffId
    is_sampled: bool


class PrefillRole:
    """What a worker does with prompts."""

    def __init__(self) -> None:
        self._computing: dict[RequestId, _Prompt] = {}
        self._held: dict[RequestId, HandoffId] = {}

    def accept(self, message: Prefill | Decode) -> EngineRequest | Rejected:
        """Return the engine's request; it makes one token, greedily if nobody reads it."""
        if not isinstance(message, Prefill):
            return Rejected(message.request_id, "this worker is in the prefill role")
        is_sampled = message.sampling is not None
        self._computing[message.request_id] = _Prompt(message.handoff_id, is_sampled)
        return EngineRequest(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling=UNREAD if message.sampling is None else message.sampling,
            produce=message.handoff_id,
            cache_salt=message.cache_salt,
            priority=message.priority,
        )

    def report(self, output: EngineOutput) -> Report:
        """Offer a prompt when it begins and when it is finished."""
        request_id = output.request_id
        if output.finish_reason is None:
            return Report(None if output.offer is None else Offered(request_id, output.offer))
        prompt = self._computing.pop(request_id)
        if output.offer is None or output.stats is None:
            return Report(_unheld(output, prompt), is_last=True)
        self._held[request_id] = prompt.handoff_id
        token = output.token_ids[0] if prompt.is_sampled else None
        return Report(Prefilled(request_id, output.offer, output.stats, token))

    def cancel(self, request_id: RequestId) -> Ending:
        """End the request in whichever of its lives it is."""
        held = self._held.pop(request_id, None)
        if held is not None:
            return Ending(release=(held,))
        if self._computing.pop(request_id, None) is None:
            return Ending()
        return Ending(abort=(request_id,))


def _unheld(output: EngineOutput, prompt: _Prompt) -> Tokens | Failed:
    """Return what an end without an offer means: the first token was the last, or a failure."""
    has_ended = output.finish_reason in FIRST_IS_LAST
    if not prompt.is_sampled or not has_ended:
        return Failed(output.request_id, "engine", f"prefill ended with {output.finish_reason}")
    return Tokens(
        output.request_id,
        output.token_ids,
        output.finish_reason,
        output.stop_reason,
        stats=output.stats,
    )
