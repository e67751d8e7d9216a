"""A prefill and a decode worker for each test that asks for them."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from cluster.config import TandemConfig, parse_config
from cluster.names import Role, WorkerId
from cluster.worker import Worker
from cluster.worker_spec import WorkerSpec
from tests.integration.cluster import two_workers
from tests.integration.cluster.two_workers import NUM_BLOCKS, ROLES, TIMEOUT_S, Cluster


@pytest.fixture
def config(tmp_path: Path) -> TandemConfig:
    facts = {"vocab_size": 4096, "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return parse_config(
        {
            "model": {"path": str(tmp_path), "chunk_tokens": 64, "block_size": 16},
            "simulated": {
                "num_blocks": NUM_BLOCKS,
                "prefill_tokens_per_s": 5000,
                "decode_step_s": 0.005,
            },
            "handoff": {"chunk_bytes": 8192, "stall_timeout_s": 1.0, "lease_s": 20},
            "router": {"worker_timeout_s": TIMEOUT_S},
        }
    )


@pytest.fixture
async def cluster(config: TandemConfig) -> AsyncIterator[Cluster]:
    workers = {
        role: Worker(
            WorkerSpec(
                WorkerId(f"{role.value}-0"),
                role,
                f"{two_workers.__name__}:MortalEngine",
                ROLES,
                config,
                (),
                "127.0.0.1",
            )
        )
        for role in Role
    }
    endpoints = {role: (await worker.start()).endpoint for role, worker in workers.items()}
    runs = {role: asyncio.create_task(worker.run()) for role, worker in workers.items()}
    context = zmq.asyncio.Context()
    yield Cluster(context, workers[Role.PREFILL], workers[Role.DECODE], endpoints, runs)
    for worker in workers.values():
        await worker.stop()
    await asyncio.gather(*runs.values(), return_exceptions=True)
    context.destroy(linger=0)
