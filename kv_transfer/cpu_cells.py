"""Where vLLM's CPU attention keeps the tokens of a block, as far as that is known.

Its kernels lay a block out as suits the processor, and say nowhere how; so a block is filled and
looked at when an engine starts.
"""

import functools

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from kv_transfer.layout import TokenShape


def token_shape(cache: torch.Tensor, spec: KVCacheSpec, dtype: torch.dtype) -> TokenShape | None:
    """Return the shape of a layer's blocks [blocks, heads, tokens, K and V], None if it is another.

    Each head has its K by channels, then its V by tokens. `dtype` is the model's; a cache of
    another is scaled, and not looked into.
    """
    if type(spec) is not FullAttentionSpec or cache.dtype != dtype or cache.dim() != 4:
        return None
    _, heads, block_size, width = cache.shape
    head_size = width // 2
    if block_size != spec.block_size or not _is_by_channels(block_size, head_size, dtype):
        return None
    return TokenShape(heads, ((head_size, dtype.itemsize), (1, head_size * dtype.itemsize)))


def kernel_of(spec: KVCacheSpec, dtype: torch.dtype, cache_dtype: str) -> str:
    """Return the name of the kernel that vLLM takes here for such a cache."""
    head_size: int | None = getattr(spec, "head_size", None)
    return _get_attn_isa(dtype, spec.block_size, head_size, cache_dtype)


@functools.cache
def _is_by_channels(block_size: int, head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel puts distinct keys and values where `token_shape` says."""
    num_numbers = block_size * head_size
    # Small integers: each dtype has them, and no two neighbours are the same.
    keys = torch.arange(num_numbers).remainder(251).to(dtype).view(block_size, 1, head_size)
    values = keys + 1
    block = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
    key_cache, value_cache = block.chunk(2, dim=2)
    isa = _get_attn_isa(dtype, block_size, head_size)
    slots = torch.arange(block_size, dtype=torch.int64)
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
    by_channels = keys[:, 0].t().reshape(-1)
    found = block.view(2, num_numbers)
    return bool(torch.equal(found[0], by_channels) and torch.equal(found[1], values.view(-1)))
