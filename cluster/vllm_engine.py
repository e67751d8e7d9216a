"""A real vLLM engine core behind the `Engine` protocol: tokens in, tokens out.

The router has tokenised and will detokenise, so the worker drives `EngineCore` through vLLM's
own client and skips `AsyncLLM`. The KV connector is named by path: this part does not import
`kv_transfer`.
"""

import asyncio
import importlib
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import setproctitle
import torch
import zmq
import zmq.asyncio
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine import FinishReason as VllmFinishReason
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from cluster.config import HandoffSection, ModelSection
from cluster.engine import (
    EngineDead,
    EngineFacts,
    EngineLoad,
    EngineOutput,
    EngineRequest,
    HandoffWords,
)
from cluster.engine_control import (
    CODEC,
    NEWS_SUFFIX,
    AskFailure,
    AskLoad,
    Attend,
    Begun,
    BlockLoad,
    DropHandoffs,
    PullFailure,
    RankLines,
    bind_locally,
)
from cluster.messages import Receipt
from cluster.metrics import MALFORMED_FRAMES
from cluster.names import FinishReason, HandoffId, RequestId, WorkerId
from cluster.submissions import Submission, Submissions
from cluster.vllm_documents import (
    logprobs_document,
    prefill_stats,
    prompt_logprobs_document,
    sampling_from_document,
)
from cluster.wire import WireError

logger = logging.getLogger(__name__)

_CONTROL_TIMEOUT_MS = 5000
# A stop takes about 1 s of CPU; vLLM kills what has not ended after this, and leaks its memory.
_STOP_S = 8.0
_FINISH = {
    VllmFinishReason.STOP: FinishReason.STOP,
    VllmFinishReason.LENGTH: FinishReason.LENGTH,
    VllmFinishReason.REPETITION: FinishReason.REPETITION,
    VllmFinishReason.ABORT: FinishReason.ABORT,
    VllmFinishReason.ERROR: FinishReason.ERROR,
}


_CONNECTOR_MODULE = "kv_transfer.connector"
# What vLLM's processes import only once they run.
_LATE_IMPORTS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
# How this process starts an engine's. "fork" only where `settle_fork` has said so: a process that
# has run tensor operations in parallel or speaks Ray must not. multiprocessing's own start method
# cannot tell, because any library that uses its default makes that "fork".
_start_method = "spawn"
# Which of them depends on the OpenMP runtime (`utils/ompmultiprocessing.py:72`).
_CORE_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


@dataclass(frozen=True, slots=True)
class VllmEngineSettings:
    """What one engine is built from; `words` spells hand-offs the connector's way, `keys` is the
    file with the deployment's CURVE keys."""

    worker_id: WorkerId
    model: ModelSection
    handoff: HandoffSection
    cpus: tuple[int, ...]
    words: HandoffWords
    keys: str | None = None


def set_process_environment(settings: VllmEngineSettings) -> None:
    """Set what vLLM reads from the environment of this process and its children.

    vLLM has no other way in for these: its engine processes are spawned and read them there.
    """
    cores = ",".join(map(str, settings.cpus))
    # The default, auto, gives every engine of a machine the same cores.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores or "nobind"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")


def import_engine(model: ModelSection) -> None:
    """Import what the processes of an engine for `model` will need; run no tensor operation."""
    is_cpu = current_platform.is_cpu()
    worker = "vllm.v1.worker.cpu_worker" if is_cpu else "vllm.v1.worker.gpu_worker"
    for name in (*_LATE_IMPORTS, worker, _CONNECTOR_MODULE):
        importlib.import_module(name)


def settle_fork(title: str) -> None:
    """Make this fork of the template one whose engine processes are forked from it in turn."""
    global _start_method
    _start_method = "fork"
    setproctitle.setproctitle(f"tandem {title}")


def settle_engine_fork() -> None:
    """Do in a forked process of the engine what an OpenMP runtime does when it is loaded.

    vLLM tells each worker its cores by variables that nothing reads after a fork.
    """
    for name in _CORE_VARIABLES:
        if name in os.environ:
            cores = [int(core) for core in re.findall(r"\d+", os.environ[name])]
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(len(cores))
            return


class VllmEngine:
    """One engine core and its workers, in processes that die with this one."""

    def __init__(self, settings: VllmEngineSettings) -> None:
        self._settings = settings
        self._epoch = secrets.randbits(63)
        # An abstract socket: nothing on disk, gone with the process however it ends.
        self._control_endpoint = f"ipc://@{settings.worker_id}-{self._epoch:x}"
        self._submissions = Submissions()
        self._client: AsyncMPClient | None = None
        self._news: zmq.asyncio.Socket | None = None
        self._lines: RankLines | None = None
        self._control_lock = asyncio.Lock()

    async def start(self) -> EngineFacts:
        """Start the processes, load the model, open the KV-plane port: on a CPU 2-3 s in a
        fork of the template, else 20-30 s."""
        set_process_environment(self._settings)
        self._config = self._engine_args().create_engine_config(UsageContext.ENGINE_CONTEXT)
        # After the CPU platform has forced spawn, whatever is safe here.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = _start_method
        self._client = await asyncio.to_thread(
            EngineCoreClient.make_async_mp_client,
            vllm_config=self._config,
            executor_class=Executor.get_class(self._config),
            log_stats=False,
        )
        # Not before the engine's processes, which may be forked from this one.
        self._news = zmq.asyncio.Context.instance().socket(zmq.PULL)
        bind_locally(self._news, self._control_endpoint + NEWS_SUFFIX)
        load = await self._ask_load(AskLoad())
        self._lines = RankLines(self._control_endpoint, len(load.endpoints))
        return EngineFacts(
            model=self._settings.model.name,
            block_size=load.block_size,
            num_blocks=load.num_blocks,
            max_model_len=self._config.model_config.max_model_len,
            vocab_size=self._config.model_config.get_vocab_size(),
            epoch=self._epoch,
            layout=load.layout,
            is_simulated=False,
        )

    def _engine_args(self) -> AsyncEngineArgs:
        model = self._settings.model
        settings: dict[str, Any] = {
            "model": model.path,
            "dtype": model.dtype,
            "max_model_len": model.max_model_len,
            "block_size": model.block_size,
            "max_num_batched_tokens": model.chunk_tokens,
            "max_num_seqs": model.max_num_seqs,
            "seed": model.seed,
            "enable_chunked_prefill": True,
            # With a placement group and TP > 1 vLLM would silently choose its Ray executor.
            "distributed_executor_backend": "mp",
            "disable_log_stats": True,
            **_cpu_defaults(),
            **model.engine_args,
            "kv_transfer_config": self._connector_config(),
        }
        if model.kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = model.kv_cache_bytes
        return AsyncEngineArgs(
            **{key: value for key, value in settings.items() if value is not None}
        )

    def _connector_config(self) -> dict[str, Any]:
        return {
            "kv_connector": "TandemConnector",
            "kv_connector_module_path": _CONNECTOR_MODULE,
            # Either role, so that a role flip needs no restart.
            "kv_role": "kv_both",
            # The router knows better where to prefill again than the engine that failed.
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {
                "worker_id": self._settings.worker_id,
                "epoch": self._epoch,
                "control_endpoint": self._control_endpoint,
                "handoff": self._settings.handoff.model_dump(),
                "keys": self._settings.keys,
            },
        }

    async def submit(self, request: EngineRequest) -> None:
        """Raises `RequestInvalid` if the sampling document is none."""
        sampling = self._sampling(request)
        prompt_token_ids = list(request.prompt_token_ids)
        if request.first_token is not None:
            prompt_token_ids.append(request.first_token)
        is_continued = request.first_token is not None
        await self._core.add_request_async(
            EngineCoreRequest(
                request_id=self._submissions.open(request.request_id, is_continued),
                prompt_token_ids=prompt_token_ids,
                mm_features=None,
                sampling_params=sampling,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=request.cache_salt,
                data_parallel_rank=None,
                priority=request.priority,
            )
        )
        self._wake()

    def _sampling(self, request: EngineRequest) -> SamplingParams:
        words = self._settings.words
        sampling = sampling_from_document(request.sampling)
        extra = sampling.extra_args or {}
        # The connector believes these parameters, so a document's own never reach it.
        extra.pop("kv_transfer_params", None)
        if request.produce is not None and sampling.max_tokens != 1:
            extra["kv_transfer_params"] = words.produce_params(request.produce)
        if request.consume is not None:
            extra["kv_transfer_params"] = words.consume_params(
                request.consume, request.awaits_token
            )
        sampling.extra_args = extra or None
        if request.produce is not None:
            sampling.max_tokens, sampling.min_tokens = 1, min(sampling.min_tokens, 1)
        if request.first_token is not None or request.awaits_token:
            assert sampling.max_tokens is not None, "the router's input processor sets it"
            sampling.max_tokens -= 1
            sampling.min_tokens = max(sampling.min_tokens - 1, 0)
        return sampling

    async def outputs(self) -> AsyncIterator[Sequence[EngineOutput]]:
        """Yield each engine step's news; raise `EngineDead` when the engine is."""
        assert self._news is not None, "start() first"
        step = asyncio.ensure_future(self._core.get_output_async())
        news = asyncio.ensure_future(self._news.recv())
        try:
            while True:
                await asyncio.wait((step, news), return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    if (begun := self._begun(news.result())) is not None:
                        yield [begun]
                    news = asyncio.ensure_future(self._news.recv())
                if step.done():
                    said = step.result().outputs
                    reasons = [await self._failure(output) for output in said]
                    # Nothing is awaited from here to the yield: no abort comes between.
                    unwanted = self._unwanted(said)
                    if told := self._told(said, reasons):
                        yield told
                    if unwanted:
                        await self.release(unwanted)
                    step = asyncio.ensure_future(self._core.get_output_async())
        except EngineDeadError as error:
            raise EngineDead(f"vLLM engine of {self._settings.worker_id} died") from error
        finally:
            step.cancel()
            news.cancel()

    def _begun(self, frame: bytes) -> EngineOutput | None:
        """Return the news that an open prompt is being computed; None for anything else."""
        try:
            news = CODEC.decode(frame)
        except WireError as error:
            MALFORMED_FRAMES.labels("engine").inc()
            logger.warning("dropped a malformed frame from the engine: %s", error)
            return None
        if not isinstance(news, Begun):
            return None
        begun = self._submissions.find(news.key)
        return None if begun is None else EngineOutput(begun.request_id, offer=news.offer)

    def _told(
        self, outputs: Sequence[EngineCoreOutput], reasons: Sequence[str | None]
    ) -> list[EngineOutput]:
        """Return a step's news of what is open; what is aborted can have crossed its abort."""
        return [
            self._output(output, submission, reason)
            for output, reason in zip(outputs, reasons, strict=True)
            if (submission := self._submissions.find(output.request_id)) is not None
        ]

    def _unwanted(self, outputs: Sequence[EngineCoreOutput]) -> list[HandoffId]:
        """Return what is held for prompts that were aborted as they finished."""
        offers = [
            self._settings.words.offered(output.kv_transfer_params)
            for output in outputs
            if self._submissions.find(output.request_id) is None
        ]
        return [offer.handoff_id for offer in offers if offer is not None]

    def _output(
        self, output: EngineCoreOutput, submission: Submission, reason: str | None
    ) -> EngineOutput:
        submission.is_running = True
        if output.finish_reason is not None:
            self._submissions.close(output.request_id)
        params = output.kv_transfer_params or {}
        receipt = params.get("receipt")
        prompt_logprobs = output.new_prompt_logprobs_tensors
        return EngineOutput(
            request_id=submission.request_id,
            token_ids=tuple(output.new_token_ids),
            finish_reason=None if output.finish_reason is None else _FINISH[output.finish_reason],
            stop_reason=output.stop_reason,
            logprobs=logprobs_document(output.new_logprobs) if output.new_logprobs else None,
            prompt_logprobs=prompt_logprobs_document(prompt_logprobs) if prompt_logprobs else None,
            stats=prefill_stats(output.prefill_stats, submission.is_continued),
            offer=self._settings.words.offered(params),
            receipt=Receipt(**receipt) if receipt else None,
            handoff_error=reason,
        )

    async def _failure(self, output: EngineCoreOutput) -> str | None:
        """Return why a request's pull failed; vLLM's error output does not say."""
        if output.finish_reason is not VllmFinishReason.ERROR:
            return None
        answer = await self._control(AskFailure(output.request_id))
        assert isinstance(answer, PullFailure)
        return answer.reason

    async def abort(self, request_ids: Sequence[RequestId]) -> None:
        keys = [key for name in request_ids if (key := self._submissions.abort(name)) is not None]
        await self._core.abort_requests_async(keys)
        self._wake()

    async def release(self, handoff_ids: Sequence[HandoffId]) -> None:
        """Free held KV caches that nobody will pull; unknown ones are ignored."""
        await self._ask_load(DropHandoffs(tuple(handoff_ids)))
        self._wake()

    def _wake(self) -> None:
        """An engine that only waits for hand-offs sleeps in its ranks, not where it hears of
        requests."""
        if self._lines is not None:
            self._lines.send(Attend())

    async def load(self) -> EngineLoad:
        blocks = await self._ask_load(AskLoad())
        return EngineLoad(
            num_running=self._submissions.num_running,
            num_waiting=self._submissions.num_waiting,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_held_blocks=blocks.num_held_blocks,
            num_held_handoffs=blocks.num_held_handoffs,
            counts=_counts(blocks.counts),
            holders=blocks.holders,
        )

    async def _ask_load(self, message: AskLoad | DropHandoffs) -> BlockLoad:
        answer = await self._control(message)
        assert isinstance(answer, BlockLoad)
        return answer

    async def _control(self, message: AskLoad | DropHandoffs | AskFailure) -> object:
        """Ask the connector's scheduler half; a fresh socket each time cannot get out of step."""
        context = zmq.asyncio.Context.instance()
        async with self._control_lock:
            with context.socket(zmq.REQ) as socket:
                socket.setsockopt(zmq.LINGER, 0)
                socket.setsockopt(zmq.RCVTIMEO, _CONTROL_TIMEOUT_MS)
                socket.connect(self._control_endpoint)
                try:
                    await socket.send(CODEC.encode(message))
                    answer: object = CODEC.decode(await socket.recv())
                except zmq.Again:
                    raise EngineDead(f"{self._settings.worker_id}: no answer on control") from None
        return answer

    async def stop(self) -> None:
        """End the engine's processes; safe to call twice and on an engine that is dead."""
        if self._client is not None:
            await asyncio.to_thread(self._client.shutdown, _STOP_S)
        if self._news is not None:
            self._news.close()
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    @property
    def _core(self) -> AsyncMPClient:
        assert self._client is not None, "start() first"
        return self._client


def _cpu_defaults() -> dict[str, Any]:
    """Return what vLLM's own defaults get wrong for engines that share a CPU host.

    Left alone, each engine claims most of the host's memory, and compiles C++ for longer than
    everything else in its start takes together.
    """
    if not current_platform.is_cpu():
        return {}
    return {"kv_cache_memory_bytes": 2**30, "enforce_eager": True}


def _counts(counts: Mapping[str, object]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if isinstance(count, int)}
