"""vLLM's `EngineClient` over a `Flow`: the text side of a request.

vLLM's front-end calls `generate`; its own input and output processors tokenise and detokenise
here, once, so templates, stop strings, log-probabilities and `n > 1` behave as they do in
vLLM. In between, each sampled sequence is one `flow.serve(...)`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from copy import copy
from http import HTTPStatus
from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine import FinishReason as VllmFinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import PrefillStats as VllmPrefillStats

from cluster.errors import RequestInvalid, TandemError
from cluster.messages import PrefillStats, Tokens
from cluster.names import FinishReason, RequestId
from cluster.request_plane import MAX_REQUEST_BYTES
from cluster.vllm_documents import (
    logprobs_from_document,
    prompt_logprobs_from_document,
    sampling_document,
)
from cluster.wire import WireError, document_bytes
from router.exchange import Exchange, current_exchange
from router.flow import GenerateRequest
from router.http_errors import HttpFailure, failure_of

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 5
# Room for ids, offers and hints beside what the client sent.
_MAX_BYTES = MAX_REQUEST_BYTES - (64 << 10)
SUPPORTED_TASKS: tuple[SupportedTask, ...] = ("generate",)
_FINISH_REASONS = {
    FinishReason.STOP: VllmFinishReason.STOP,
    FinishReason.LENGTH: VllmFinishReason.LENGTH,
    FinishReason.REPETITION: VllmFinishReason.REPETITION,
    FinishReason.ABORT: VllmFinishReason.ABORT,
    FinishReason.ERROR: VllmFinishReason.ERROR,
}


class TokenSource(Protocol):
    """The one thing asked of a `Flow`. Closing the generator ends the request on the workers."""

    def serve(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]: ...


class RequestEnded(GenerationError):
    """A request that failed, as the one exception vLLM's routes pass on without a stack trace.

    Its status reaches a client that already has tokens, inside an SSE chunk; before that the
    exchange layer answers with the failure itself.
    """

    def __init__(self, failure: HttpFailure) -> None:
        super().__init__(failure.message)
        self.status_code = failure.status


class Generation:
    """The running sequences of one `generate` call: a task each, feeding one collector."""

    def __init__(
        self, given_id: str, queue: RequestOutputCollector, processor: OutputProcessor
    ) -> None:
        self.given_id = given_id
        self.queue = queue
        self._processor = processor
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, flow: TokenSource, request: GenerateRequest, exchange: Exchange) -> None:
        """Begin one sampled sequence."""
        self._tasks.append(asyncio.create_task(self._run(flow, request, exchange)))

    async def _run(self, flow: TokenSource, request: GenerateRequest, exchange: Exchange) -> None:
        try:
            await self._feed(flow, request, exchange)
        except TandemError as error:
            self.queue.put(error)
        except Exception:
            logger.exception("request %s failed unexpectedly", request.request_id)
            self.queue.put(GenerationError())

    async def _feed(self, flow: TokenSource, request: GenerateRequest, exchange: Exchange) -> None:
        """Hand every message to the output processor, in one step with no await between."""
        is_finished = False
        async with aclosing(flow.serve(request)) as stream:
            async for tokens in stream:
                is_finished = tokens.finish_reason is not None
                if tokens.token_ids or is_finished:
                    exchange.has_tokens = True
                output = _core_output(request.request_id, tokens)
                if self._processor.process_outputs([output]).reqs_to_abort:
                    # A stop string: leaving closes the flow, which cancels both legs.
                    return
        if not is_finished:
            raise RuntimeError("the flow ended without a finish reason")

    def cancel(self) -> None:
        """Give the sequences up: `generate` sees an aborted output, the flow a cancellation."""
        for task in self._tasks:
            task.cancel()
        self._processor.abort_requests([self.queue.request_id], internal=True)

    async def finish(self) -> None:
        """Let flows that have said their last word end by themselves."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """End what still runs and wait until the workers were told."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class TandemEngineClient(EngineClient):
    """What vLLM's serving classes ask of an engine, answered by `flow`."""

    def __init__(self, vllm_config: VllmConfig, flow: TokenSource, max_sequences: int) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self._flow = flow
        self._max_sequences = max_sequences
        self._running: set[Generation] = set()

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; leaving early ends it on the workers before returning.

        Raises `RequestEnded` for every failure, after reporting it to the exchange.
        """
        exchange = current_exchange()
        try:
            if lora_request is not None:
                raise RequestInvalid("LoRA adapters are not served")
            if isinstance(prompt, AsyncGenerator | EngineCoreRequest):
                raise RequestInvalid("only rendered prompts are supported")
            with exchange.running(sampling_params.n, self._max_sequences):
                request = self._core_request(prompt, sampling_params, request_id, priority)
                text, *_ = extract_prompt_components(self.model_config, prompt)
                outputs = self._outputs(request, prompt_text or text, exchange)
                async with aclosing(outputs):
                    async for output in outputs:
                        yield output
        except Exception as error:
            failure = _failure_of(error)
            exchange.fail(failure)
            raise RequestEnded(failure) from error

    def _core_request(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, priority: int
    ) -> EngineCoreRequest:
        request = self.input_processor.process_inputs(
            request_id,
            prompt,
            sampling_params,
            supported_tasks=SUPPORTED_TASKS,
            priority=priority,
        )
        _refuse_what_legs_cannot_carry(request)
        self.input_processor.assign_request_id(request)
        return request

    async def _outputs(
        self, request: EngineCoreRequest, text: str | None, exchange: Exchange
    ) -> AsyncGenerator[RequestOutput, None]:
        if exchange.is_closed:
            return
        sampling = _sampling_of(request)
        queue = RequestOutputCollector(sampling.output_kind, request.request_id)
        generation = Generation(str(request.external_req_id), queue, self._output_processor)
        self._running.add(generation)
        exchange.on_close(generation.cancel)
        try:
            parent = ParentRequest(request) if sampling.n > 1 else None
            prompt = tuple(request.prompt_token_ids or ())
            for index, child in enumerate(_children(request, parent)):
                self._output_processor.add_request(child, text, parent, index, queue)
                generation.start(self._flow, _flow_request(child, prompt, exchange), exchange)
            is_finished = False
            while not is_finished:
                output = queue.get_nowait() or await queue.get()
                assert isinstance(output, RequestOutput)
                is_finished = output.finished
                yield output
            await generation.finish()
        finally:
            exchange.forget(generation.cancel)
            self._running.discard(generation)
            await generation.close()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by the ids `generate` was given; each yields an aborted output."""
        ids = {request_id} if isinstance(request_id, str) else set(request_id)
        for generation in self._running.copy():
            if generation.given_id in ids:
                generation.cancel()

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        """False: whether a worker is there is asked per request, and `/health` is ours."""
        return False

    @property
    def dead_error(self) -> BaseException:
        return GenerationError("the router has no engine of its own")

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return SUPPORTED_TASKS

    async def check_health(self) -> None:
        return None

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        return None

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop the renderer's threads; requests are ended by whoever runs them."""
        self.renderer.shutdown()

    # What follows changes an engine. A pool of workers is changed through its controller, and
    # the routes that would call these are not served.

    def encode(self, *_args: Any, **_kwargs: Any) -> AsyncGenerator[Any, None]:
        raise _not_of_a_router("encode")

    async def notify_kv_transfer_request_rejected(self, *_args: Any, **_kwargs: Any) -> None:
        raise _not_of_a_router("notify_kv_transfer_request_rejected")

    async def start_profile(self, *_args: Any, **_kwargs: Any) -> None:
        raise _not_of_a_router("start_profile")

    async def stop_profile(self) -> None:
        raise _not_of_a_router("stop_profile")

    async def reset_mm_cache(self) -> None:
        raise _not_of_a_router("reset_mm_cache")

    async def reset_encoder_cache(self) -> None:
        raise _not_of_a_router("reset_encoder_cache")

    async def reset_prefix_cache(self, *_args: Any, **_kwargs: Any) -> bool:
        raise _not_of_a_router("reset_prefix_cache")

    async def sleep(self, *_args: Any, **_kwargs: Any) -> None:
        raise _not_of_a_router("sleep")

    async def release_kv_cache_memory(self) -> None:
        raise _not_of_a_router("release_kv_cache_memory")

    async def wake_up(self, *_args: Any, **_kwargs: Any) -> bool:
        raise _not_of_a_router("wake_up")

    async def add_lora(self, *_args: Any, **_kwargs: Any) -> bool:
        raise _not_of_a_router("add_lora")

    async def pause_generation(self, *_args: Any, **_kwargs: Any) -> None:
        raise _not_of_a_router("pause_generation")

    async def resume_generation(self) -> None:
        raise _not_of_a_router("resume_generation")


def _not_of_a_router(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} is an engine's; a router has none")


def _sampling_of(request: EngineCoreRequest) -> SamplingParams:
    assert request.sampling_params is not None, "a pooling request cannot get this far"
    return request.sampling_params


def _refuse_what_legs_cannot_carry(request: EngineCoreRequest) -> None:
    """Raise `RequestInvalid` for inputs that neither leg's message has a place for."""
    if request.mm_features:
        raise RequestInvalid("image, audio and video inputs are not supported")
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise RequestInvalid("prompt_embeds are not supported")
    sampling = _sampling_of(request)
    if sampling.prompt_logprob_token_ids is not None:
        raise RequestInvalid("prompt_logprob_token_ids are not supported")
    # Hand-offs are the router's own; a client's parameters would reach the connector.
    for name in ("kv_transfer_params", "ec_transfer_params"):
        if name in (sampling.extra_args or {}):
            raise RequestInvalid(f"{name} cannot be given by a client")


def _children(request: EngineCoreRequest, parent: ParentRequest | None) -> list[EngineCoreRequest]:
    """Return one request per sampled sequence, every id known to `parent` before any starts."""
    if parent is None:
        return [request]
    children = []
    for index in range(parent.n):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        children.append(child)
    return children


def _flow_request(
    child: EngineCoreRequest, prompt: tuple[int, ...], exchange: Exchange
) -> GenerateRequest:
    sampling = _sampling_of(child)
    request = GenerateRequest(
        request_id=RequestId(child.request_id),
        exchange_id=exchange.exchange_id,
        prompt_token_ids=prompt,
        sampling=sampling_document(sampling),
        # vLLM computes prompt log-probabilities from a full local prefill only.
        local_only=sampling.prompt_logprobs is not None,
        cache_salt=child.cache_salt,
        priority=child.priority,
        traceparent=exchange.traceparent,
    )
    others = {"cache_salt": request.cache_salt, "priority": request.priority}
    try:
        num_bytes = document_bytes(request.sampling) + document_bytes(others)
    except WireError as error:
        raise RequestInvalid(f"a parameter cannot be sent to a worker: {error}") from None
    num_bytes += _TOKEN_BYTES * len(prompt)
    if num_bytes > _MAX_BYTES:
        raise RequestInvalid(f"prompt and parameters take {num_bytes} bytes, over {_MAX_BYTES}")
    return request


def _core_output(request_id: str, tokens: Tokens) -> EngineCoreOutput:
    """Return `tokens` as vLLM's engine core would have said it."""
    reason, logprobs, prompt = tokens.finish_reason, tokens.logprobs, tokens.prompt_logprobs
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=list(tokens.token_ids),
        new_logprobs=None if logprobs is None else logprobs_from_document(logprobs),
        new_prompt_logprobs_tensors=(
            None if prompt is None else prompt_logprobs_from_document(prompt)
        ),
        finish_reason=None if reason is None else _FINISH_REASONS[reason],
        stop_reason=tokens.stop_reason,
        prefill_stats=None if tokens.stats is None else _prefill_stats(tokens.stats),
    )


def _prefill_stats(stats: PrefillStats) -> VllmPrefillStats:
    """Return the stats that `usage` is made of.

    A client's `cached_tokens` are prompt tokens nobody had to compute. Transferred ones were
    computed for this request by a prefill worker, so they do not count.
    """
    return VllmPrefillStats(
        num_prompt_tokens=stats.num_prompt_tokens,
        num_computed_tokens=stats.num_computed_tokens,
        num_cached_tokens=stats.num_local_cached_tokens,
        num_local_cached_tokens=stats.num_local_cached_tokens,
        num_external_cached_tokens=stats.num_transferred_tokens,
    )


def _failure_of(error: Exception) -> HttpFailure:
    """Return what the client is told: our mapping for our errors, vLLM's for vLLM's."""
    if isinstance(error, TandemError):
        return failure_of(error)
    told = create_error_response(error).error
    status = HTTPStatus(told.code)
    if status is HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, GenerationError):
        logger.error("a request failed unexpectedly", exc_info=error)
    return HttpFailure(status, told.type, told.message, told.param)
