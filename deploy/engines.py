"""Engines as a worker loads them by name: each composed with its hand-off side."""

from cluster.engine import Engine
from cluster.worker_spec import WorkerSpec


def vllm_engine(spec: WorkerSpec) -> Engine:
    """Return a vLLM engine whose connector is `kv_transfer.connector`."""
    from cluster.vllm_engine import VllmEngine, VllmEngineSettings
    from kv_transfer import protocol

    return VllmEngine(
        VllmEngineSettings(
            worker_id=spec.worker_id,
            model=spec.config.model,
            handoff=spec.config.handoff,
            cpus=spec.cpus,
            words=protocol,
        )
    )
