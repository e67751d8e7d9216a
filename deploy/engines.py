"""Engines as a worker loads them by name: each composed with its hand-off side."""

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import ModelSection
from cluster.engine import Engine
from cluster.errors import ConfigError
from cluster.names import Role
from cluster.ring_file import key_source
from cluster.worker_spec import WorkerSpec

if TYPE_CHECKING:
    from cluster.sim_engine import SimulatedModel


# The classes that fill the protocols `cluster` knows, as a worker's specification names them.
ENGINES = {
    "vllm": "deploy.engines:vllm_engine",
    "simulated": "deploy.engines:simulated_engine",
}
AUTOSCALER = "autoscaler.loop:Autoscaler"
ROLES = {
    Role.PREFILL: "prefill_workers.role:PrefillRole",
    Role.DECODE: "decode_workers.role:DecodeRole",
}


def vllm_engine(spec: WorkerSpec) -> Engine:
    """Return a vLLM engine whose connector is `kv_transfer.connector`."""
    from cluster.vllm_engine import VllmEngine, VllmEngineSettings
    from kv_transfer import protocol

    return VllmEngine(
        VllmEngineSettings(
            worker_id=spec.worker_id,
            model=_model_in_pool(spec),
            handoff=spec.config.handoff,
            cpus=spec.cpus,
            words=protocol,
            keys=spec.keys,
        )
    )


def _model_in_pool(spec: WorkerSpec) -> ModelSection:
    """Return the model's section with what its pool lays over the engine's arguments."""
    model, config = spec.config.model, spec.config
    pool = config.pool(spec.role)
    split = {"tensor_parallel_size": pool.tensor_parallel_size}
    return model.model_copy(update={"engine_args": split | model.engine_args | pool.engine_args})


def simulated_engine(spec: WorkerSpec) -> Engine:
    """Return a simulated engine over real hand-offs; loads neither torch nor vLLM."""
    from cluster.sim_engine import SimulatedEngine
    from kv_transfer.host_port import HostHandoffPort
    from kv_transfer.layout import BlockLayout, GroupLayout

    config, epoch = spec.config, secrets.randbits(63)
    if (wire_dtype := config.handoff.wire_dtype) != "as_is":
        raise ConfigError(f"handoff.wire_dtype {wire_dtype}: simulated blocks hold no numbers")
    model = _simulated_model(config.model)
    group = GroupLayout(model.block_size, (config.simulated.block_bytes,))
    layout = BlockLayout((group,), {"model": model.name, "engine": "simulated"})
    keys = key_source(spec.keys)
    port = HostHandoffPort(layout, config.simulated.num_blocks, config.handoff, epoch, keys)
    return SimulatedEngine(
        spec.worker_id, model, config.simulated, config.handoff.lease_s, port, epoch
    )


def _simulated_model(section: ModelSection) -> "SimulatedModel":
    """Read the sizes a simulated model keeps from the real one's `config.json`."""
    from cluster.sim_engine import SimulatedModel

    facts = json.loads((Path(section.path) / "config.json").read_text())
    return SimulatedModel(
        name=section.name,
        vocab_size=facts["vocab_size"],
        max_model_len=section.max_model_len or facts["max_position_embeddings"],
        block_size=section.block_size or 128,
        chunk_tokens=section.chunk_tokens,
        max_num_seqs=section.max_num_seqs,
    )
