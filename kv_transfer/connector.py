"""vLLM's connector: a facade over the half beside the scheduler and the half in each worker.

Named in the engine's `kv_transfer_config`; see `vllm/distributed/kv_transfer/kv_connector/v1/
base.py` for when vLLM calls what. Hand-offs work at step granularity: there are no per-layer
hooks, so CUDA graphs stay whole.
"""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from cluster.vllm_cpu import sleep_when_idle
from kv_transfer.connector_scheduler import SchedulerHalf
from kv_transfer.connector_settings import ConnectorSettings
from kv_transfer.connector_worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class TandemConnector(KVConnectorBase_V1, SupportsHMA):
    """Holds the KV caches of producing requests and pulls those of consuming ones."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = ConnectorSettings.from_extra_config(
            self._kv_transfer_config.kv_connector_extra_config
        )
        if vllm_config.device_config.device_type == "cpu":
            sleep_when_idle()
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(settings, kv_cache_config)
        else:
            self._worker = WorkerHalf(settings, vllm_config, kv_cache_config)

    # Beside the scheduler.

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduler.set_addresses(metadata)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: "Request") -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.num_tokens_to_pull(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        self._scheduler.on_blocks_allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self._scheduler.take_orders(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.on_worker_output(connector_output)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.on_request_finished(request, block_ids)

    # In each worker.

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.address()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._worker.prepare(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.begin_pulls(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.take_results()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.take_receipts()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only when all its blocks are there."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to save: consumers read the engine's own blocks."""

    def wait_for_save(self) -> None:
        """Nothing to wait for: held blocks are not reused until their hold ends."""

    def shutdown(self) -> None:
        (self._scheduler if self.role is KVConnectorRole.SCHEDULER else self._worker).close()
