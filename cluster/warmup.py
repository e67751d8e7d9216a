"""The warm-up hand-off: proof that a decode worker really receives a prefill worker's KV cache.

A deployment whose hand-off moves nothing still answers, from two prefills; so a worker is only
listed after its tokens were seen to arrive, by the engine's count and by the producer's bytes.
"""

import asyncio
import random
import zlib

from cluster.config import ModelSection
from cluster.errors import HandoffFailed, TandemError
from cluster.messages import (
    Decode,
    Failed,
    Offered,
    Prefill,
    Prefilled,
    Receipt,
    Rejected,
    Tokens,
)
from cluster.names import HandoffId, RequestId
from cluster.request_plane import Leg, WorkerLink
from cluster.worker_state import Pair

PROOF_TIMEOUT_S = 30.0
# Every tokenizer has this many tokens; blocks of 128 tokens are vLLM's largest default.
_TOKENS = range(3, 250)
_DEFAULT_BLOCK_SIZE = 128


def warmup_prompt(model: ModelSection, pair: Pair, salt: str) -> tuple[int, ...]:
    """Return two blocks and a bit of tokens that no worker has cached."""
    length = 2 * (model.block_size or _DEFAULT_BLOCK_SIZE) + 7
    if model.max_model_len is not None:
        length = min(length, model.max_model_len - 2)
    rng = random.Random(zlib.crc32(repr((pair, salt)).encode()))
    return tuple(rng.choices(_TOKENS, k=length))


async def prove_handoff(
    prefill: WorkerLink, decode: WorkerLink, prompt: tuple[int, ...], salt: str
) -> None:
    """Hand one prompt over; raise `HandoffFailed` saying what did not arrive."""
    name = f"warmup-{prefill.worker_id}-{decode.worker_id}-{salt}"
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            prefilled = RequestId(f"{name}-p")
            request = Prefill(prefilled, HandoffId(name), prompt, None, 0)
            with prefill.open(request) as leg:
                offer = (await _prefilled(leg)).offer
                pulled = RequestId(f"{name}-d")
                sampling = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
                with decode.open(Decode(pulled, prompt, sampling, offer, None, 0)) as pull:
                    await _check_arrival(pull, len(prompt))
    except TimeoutError:
        reason = f"no hand-off within {PROOF_TIMEOUT_S:.0f} s"
        raise HandoffFailed(f"{prefill.worker_id} -> {decode.worker_id}: {reason}") from None
    except TandemError as error:
        raise HandoffFailed(f"{prefill.worker_id} -> {decode.worker_id}: {error}") from None


async def _prefilled(leg: Leg) -> Prefilled:
    message = await leg.receive()
    if isinstance(message, Offered):
        message = await leg.receive()
    if isinstance(message, Prefilled):
        return message
    raise HandoffFailed(f"prefill: {_explain(message)}")


async def _check_arrival(leg: Leg, num_prompt_tokens: int) -> None:
    transferred, receipt, is_finished = 0, None, False
    while not is_finished:
        message = await leg.receive()
        if not isinstance(message, Tokens):
            raise HandoffFailed(f"decode: {_explain(message)}")
        if message.stats is not None:
            transferred = message.stats.num_transferred_tokens
        receipt = message.receipt or receipt
        is_finished = message.finish_reason is not None
    if fault := find_fault(transferred, num_prompt_tokens, receipt):
        raise HandoffFailed(fault)


def find_fault(transferred: int, num_prompt_tokens: int, receipt: Receipt | None) -> str | None:
    """Return what is wrong with a hand-off's counts; decode may recompute the last token."""
    if transferred < num_prompt_tokens - 1:
        return f"{transferred} of {num_prompt_tokens} prompt tokens arrived"
    if receipt is None or receipt.received_bytes == 0:
        return "no KV bytes arrived"
    if receipt.received_bytes != receipt.produced_bytes:
        return f"{receipt.produced_bytes} KV bytes sent, {receipt.received_bytes} received"
    return None


def _explain(message: object) -> str:
    if isinstance(message, Failed | Rejected):
        return message.reason
    return f"unexpected {type(message).__name__}"
