"""One disaggregated deployment and one monolithic server for all tests of this folder in one
process: engines are slow to start."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.served import Served, monolith, tandem

BLOCK_SIZE = 128
CHUNK_TOKENS = 256
MAX_MODEL_LEN = 2048


@contextmanager
def disaggregation(name: str, **flags: Any) -> Iterator[Served]:
    """Run 1P1D, float32, small chunks, and no recovery unless `flags` say so: a failed hand-off
    fails its request."""
    settings = {
        "model__dtype": "float32",
        "model__chunk_tokens": CHUNK_TOKENS,
        "model__kv_cache_gib": 0.5,
        "model__frontend_args": {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
        "router__recovery": "none",
        # Two files run at a time: a worker that gets no core for a while is not lost.
        "router__worker_timeout_s": 10.0,
    }
    with tandem(name, **{**settings, **flags}) as served:
        yield served


@pytest.fixture(scope="package")
def disaggregated() -> Iterator[Served]:
    with disaggregation("test-e2e") as served:
        yield served


@pytest.fixture(scope="package")
def monolithic() -> Iterator[Served]:
    """One vLLM engine of the same build; its chunk takes any prompt in one step."""
    with monolith(
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        max_num_seqs=64,
        enforce_eager=True,
        kv_cache_memory_bytes=512 << 20,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
    ) as served:
        yield served
