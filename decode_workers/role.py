"""The decode role: pull a prompt's KV cache, or compute it, and stream tokens."""

from cluster.engine import EngineOutput, EngineRequest
from cluster.messages import Decode, Failed, Prefill, Rejected, Tokens
from cluster.names import FinishReason, RequestId
from cluster.roles import Ending, Report


class DecodeRole:
    """What a worker does with streams."""

    def __init__(self) -> None:
        self._num_sent: dict[RequestId, int] = {}

    def accept(self, message: Prefill | Decode) -> EngineRequest | Rejected:
        if not isinstance(message, Decode):
            return Rejected(message.request_id, "this worker is in the decode role")
        self._num_sent[message.request_id] = 0
        return EngineRequest(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            consume=message.offer,
            cache_salt=message.cache_salt,
            priority=message.priority,
            first_token=message.first_token,
            awaits_token=message.awaits_token,
        )

    def report(self, output: EngineOutput) -> Report:
        """Pass tokens on; say of a failure whether another hand-off may cure it."""
        is_last = output.finish_reason is not None
        num_before = self._num_sent.pop(output.request_id)
        if not is_last:
            self._num_sent[output.request_id] = num_before + len(output.token_ids)
        if output.finish_reason is FinishReason.ERROR:
            return Report(_failed(output), is_last=True)
        message = Tokens(
            request_id=output.request_id,
            token_ids=output.token_ids,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            stats=output.stats,
            receipt=output.receipt,
            num_before=num_before,
        )
        return Report(message, is_last=is_last)

    def cancel(self, request_id: RequestId) -> Ending:
        is_known = self._num_sent.pop(request_id, None) is not None
        return Ending(abort=(request_id,)) if is_known else Ending()


def _failed(output: EngineOutput) -> Failed:
    if output.handoff_error is not None:
        return Failed(output.request_id, "handoff", output.handoff_error)
    return Failed(output.request_id, "engine", "the engine could not go on with the request")
