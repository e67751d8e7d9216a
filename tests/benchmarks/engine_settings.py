"""The engines of the benchmarks: one set of settings, said in our words and in vLLM's."""

from pathlib import Path
from typing import Any

MODEL = Path(".cache/bench-model")
# CPUs without bfloat16 instructions take three times as long over it.
DTYPE = "float32"
MAX_MODEL_LEN = 2048
CHUNK_TOKENS = 2048
MAX_NUM_SEQS = 64
KV_CACHE_GIB = 0.5


def model_section(chunk_tokens: int = CHUNK_TOKENS) -> dict[str, Any]:
    """Return the settings as a `model:` section has them, without its path."""
    return {
        "dtype": DTYPE,
        "max_model_len": MAX_MODEL_LEN,
        "chunk_tokens": chunk_tokens,
        "max_num_seqs": MAX_NUM_SEQS,
        "kv_cache_gib": KV_CACHE_GIB,
    }


def tandem_settings(chunk_tokens: int = CHUNK_TOKENS) -> dict[str, Any]:
    """Return what `tests.served.tandem` is given."""
    return {f"model__{name}": value for name, value in model_section(chunk_tokens).items()}


def vllm_settings(chunk_tokens: int = CHUNK_TOKENS) -> dict[str, Any]:
    """Return what `tests.served.monolith` is given for the same engine."""
    return {
        "dtype": DTYPE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": chunk_tokens,
        "max_num_seqs": MAX_NUM_SEQS,
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(KV_CACHE_GIB * 2**30),
    }
