"""Batches in one HTTP request, counted before any of their prompts is rendered.

vLLM renders every prompt of a batch before it asks the engine for anything, in the loop that all
streams of this router share; a body of the largest size has room for millions of prompts.
"""

from typing import Any

from router.exchange import too_many_sequences


class _Bounded:
    """One of vLLM's handlers, for requests of at most `max_sequences` sequences."""

    def __init__(self, handler: Any, max_sequences: int) -> None:
        self._handler = handler
        self._max_sequences = max_sequences

    def _refusal(self, num_prompts: int, n: int | None) -> Any | None:
        """Return vLLM's answer to a request for too many, None if they are not."""
        if num_prompts * (n or 1) <= self._max_sequences:
            return None
        return self._handler.create_error_response(str(too_many_sequences(self._max_sequences)))


class BoundedCompletions(_Bounded):
    """Of `OpenAIServingCompletion`, what its route calls."""

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        prompts = request.prompt
        # One prompt is a text or a list of token ids.
        is_batch = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
        refusal = self._refusal(len(prompts) if is_batch else 1, request.n)
        return refusal or await self._handler.create_completion(request, raw_request)


class BoundedChatBatches(_Bounded):
    """Of `OpenAIServingChatBatch`, what its route calls."""

    async def create_batch_chat_completion(self, request: Any, raw_request: Any) -> Any:
        refusal = self._refusal(len(request.messages), request.n)
        return refusal or await self._handler.create_batch_chat_completion(request, raw_request)
