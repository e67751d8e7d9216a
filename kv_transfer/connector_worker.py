"""The half of the connector in each vLLM worker: its KV tensors behind a hand-off port."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from cluster.engine import EndedPull
from cluster.process_guard import die_with_parent, end_quickly
from cluster.ring_file import key_source
from cluster.vllm_cpu import claim_amx_tiles, make_seeded_prompts_chunkable
from kv_transfer.array_blocks import ArrayBlockStore
from kv_transfer.blocks import BlockStore
from kv_transfer.connector_settings import ConnectorSettings, Orders, PortAddress, WorkerReport
from kv_transfer.layout import BlockLayout, GroupLayout, TokenShape
from kv_transfer.packed_blocks import PackedBlockStore
from kv_transfer.port import HandoffPort
from kv_transfer.protocol import Via
from kv_transfer.rank_line import RankLine
from kv_transfer.tensor_blocks import TensorBlockStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


class UnsupportedCache(ValueError):
    """This model's KV cache cannot be handed over; the engine refuses to start."""


def block_rows(name: str, cache: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """Return byte matrices [num_blocks, bytes] over `cache`, without copying.

    Backends put the block dimension first, or second behind a K/V pair, and a block's own
    dimensions in any order (`KVCacheLayout`); anything else, or one whose bytes are not all of a
    piece, raises `UnsupportedCache`.
    """
    if cache.shape[0] == num_blocks:
        parts = [cache]
    elif cache.dim() > 1 and cache.shape[:2] == (2, num_blocks):
        parts = list(cache.unbind(0))
    else:
        raise UnsupportedCache(f"{name}: no block dimension in {tuple(cache.shape)}")
    if not all(map(_is_compact, parts)):
        strides = f"{tuple(cache.shape)} with strides {cache.stride()}"
        raise UnsupportedCache(f"{name}: a block is not of a piece in {strides}")
    flat = [part.as_strided((num_blocks, part[0].numel()), (part.stride(0), 1)) for part in parts]
    return [rows.view(torch.uint8) for rows in flat]


def _is_compact(blocks: torch.Tensor) -> bool:
    """Whether there are no gaps between blocks, nor, in some order, between a block's numbers."""
    sizes = {dim: size for dim, size in enumerate(blocks.shape) if size > 1}
    dense = 1
    for dim in sorted(sizes, key=blocks.stride):
        if blocks.stride(dim) != dense:
            return False
        dense *= sizes[dim]
    return bool(blocks.stride(0) * blocks.shape[0] == dense)


def are_tensors_needed(transports: tuple[str, ...]) -> bool:
    """Return whether a way is named that carries tensors of the host too."""
    return Via.GLOO in transports


def store_over(
    layout: BlockLayout, regions: list[list[torch.Tensor]], transports: tuple[str, ...]
) -> BlockStore:
    """Return blocks in `regions`; the host's as arrays, which copy faster, where a way that
    needs tensors is not named."""
    if regions[0][0].device.type == "cpu" and not are_tensors_needed(transports):
        return ArrayBlockStore(layout, [[row.numpy() for row in rows] for rows in regions])
    return TensorBlockStore(layout, regions)


class WorkerHalf:
    """Carries out the scheduler half's orders on this rank's port and reports back."""

    def __init__(
        self,
        settings: ConnectorSettings,
        vllm_config: "VllmConfig",
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        die_with_parent()
        end_quickly()
        if vllm_config.device_config.device_type == "cpu":
            claim_amx_tiles()
            make_seeded_prompts_chunkable()
        self._settings = settings
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank = get_tensor_model_parallel_rank()
        self._port: HandoffPort | None = None
        self._line: RankLine | None = None
        self._store: BlockStore | None = None
        self._report: WorkerReport | None = None
        self._last_totals: dict[str, int] = {}
        self._patience_s: float | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the port over the engine's KV tensors; raise `ValueError` if they cannot go."""
        num_blocks = self._kv_cache_config.num_blocks
        regions: list[list[torch.Tensor]] = []
        groups: list[GroupLayout] = []
        dtypes: list[list[torch.dtype]] = []
        for group in self._kv_cache_config.kv_cache_groups:
            found = [
                (row, kv_caches[name].dtype)
                for name in group.layer_names
                for row in block_rows(name, kv_caches[name], num_blocks)
            ]
            rows = [row for row, _ in found]
            regions.append(rows)
            dtypes.append([dtype for _, dtype in found])
            sizes = tuple(row.shape[1] for row in rows)
            shapes = self._shapes(group, kv_caches)
            groups.append(GroupLayout(group.kv_cache_spec.block_size, sizes, shapes))
        settings = self._settings
        layout = BlockLayout(tuple(groups), self._identity(self._kernel(groups)))
        store = store_over(layout, regions, settings.handoff.transports)
        if settings.handoff.wire_dtype != "as_is":
            if store.device is not None:
                raise UnsupportedCache("handoff.wire_dtype packs blocks in host memory only")
            store = PackedBlockStore(store, dtypes, settings.handoff.wire_dtype)
        self._store = store
        self._port = HandoffPort(
            self._store,
            settings.handoff,
            settings.epoch,
            self._rank,
            self._vllm_config.scheduler_config.max_num_batched_tokens,
            keys=key_source(settings.keys),
        )
        num_ranks = self._vllm_config.parallel_config.tensor_parallel_size
        self._line = RankLine(settings.control_endpoint, self._rank, num_ranks, self._port)
        self._layout = store.layout.outline()

    def _shapes(
        self, group: "KVCacheGroupSpec", kv_caches: dict[str, torch.Tensor]
    ) -> tuple[TokenShape, ...]:
        """Return where the group's blocks have their tokens, by layer, where that is known."""
        is_host = self._vllm_config.device_config.device_type == "cpu"
        if not is_host or are_tensors_needed(self._settings.handoff.transports):
            return ()
        # It imports what only vLLM's CPU build has.
        from kv_transfer.cpu_cells import token_shape

        spec, dtype = group.kv_cache_spec, self._vllm_config.model_config.dtype
        found = [token_shape(kv_caches[name], spec, dtype) for name in group.layer_names]
        known = tuple(shape for shape in found if shape is not None)
        return known if len(known) == len(found) else ()

    def _kernel(self, groups: Sequence[GroupLayout]) -> str:
        """Return what lays blocks out on this processor, where their tokens are not known; another
        one may lay blocks of the same size out another way."""
        is_host = self._vllm_config.device_config.device_type == "cpu"
        is_packed = self._settings.handoff.wire_dtype != "as_is"
        if not is_host or (BlockLayout(tuple(groups), {}).is_recuttable and not is_packed):
            return ""
        # It imports what only vLLM's CPU build has.
        from kv_transfer.cpu_cells import kernel_of

        dtype = self._vllm_config.model_config.dtype
        cache_dtype = str(self._vllm_config.cache_config.cache_dtype)
        specs = [group.kv_cache_spec for group in self._kv_cache_config.kv_cache_groups]
        return "+".join(kernel_of(spec, dtype, cache_dtype) for spec in specs)

    def _identity(self, kernel: str) -> dict[str, str | int]:
        model, parallel = self._vllm_config.model_config, self._vllm_config.parallel_config
        cache = self._vllm_config.cache_config
        return {
            "cache_layout": str(cache.kv_cache_layout),
            "kernel": kernel,
            "model": model.model,
            "revision": str(model.revision),
            "dtype": str(model.dtype),
            "cache_dtype": str(cache.cache_dtype),
            "wire_dtype": self._settings.handoff.wire_dtype,
            "tensor_parallel": parallel.tensor_parallel_size,
            "pipeline_parallel": parallel.pipeline_parallel_size,
        }

    def address(self) -> PortAddress | None:
        return PortAddress(self._port.endpoint, self._layout) if self._port else None

    def prepare(self, orders: "KVConnectorMetadata") -> None:
        """Hand what is to be known before this step computes to the port's thread: the step may
        use revoked blocks again, and lasts too long for others to wait for finished ones."""
        assert isinstance(orders, Orders) and self._port is not None and self._line is not None
        self._patience_s = orders.patience_s
        self._follow()
        for handoff_id, key in orders.opened:
            self._port.open(handoff_id, key)
        for handoff_id in orders.revoked:
            self._port.revoke(handoff_id)
        for growth in orders.grown:
            self._port.grow(growth)
        for hold in orders.holds:
            self._line.hold(hold)
        for handoff_id, key in orders.abandoned:
            self._port.abandon(handoff_id, key)
        for handoff_id in orders.drops:
            self._port.abort(handoff_id)

    def begin_pulls(self, orders: "KVConnectorMetadata") -> None:
        """Hand what is to be pulled, or not any more, to the port's thread. vLLM calls this when
        it has cleared new blocks where a model needs that, and mostly after the step."""
        assert isinstance(orders, Orders) and self._port is not None
        if orders.pulls:
            self._follow()
        for offer in orders.announced:
            self._port.announce(offer)
        for offer in orders.given_up:
            self._port.give_up(offer)
        for pull in orders.pulls:
            self._port.pull(pull)
        for key in orders.cancels:
            self._port.cancel(key)

    def _follow(self) -> None:
        if isinstance(self._store, TensorBlockStore):
            self._store.follow()

    def take_results(self) -> KVConnectorTransferResults:
        """Return, each key once, the holds and pulls that ended since the last step."""
        assert self._port is not None and self._line is not None
        if self._patience_s is not None:
            self._line.wait(self._patience_s)
        freed, pulls = self._port.take_freed(), list(map(self._checked, self._port.take_pulls()))
        if self._patience_s is not None and (freed or pulls):
            self._line.rouse()
        failures = {pull.key: pull.failure for pull in pulls if pull.failure}
        totals = self._port.totals()
        if pulls or totals != self._last_totals:
            receipts = {pull.key: pull.receipt for pull in pulls}
            tokens = {p.key: p.first_token for p in pulls if p.first_token is not None}
            self._report = WorkerReport(receipts, failures, tokens, {self._rank: totals})
            self._last_totals = totals
        return KVConnectorTransferResults(
            finished_sending=set(freed),
            finished_recving={pull.key for pull in pulls},
            failed_recving=set(failures),
        )

    def _checked(self, pull: EndedPull) -> EndedPull:
        """Fail a pull whose first token the model does not know: it would end this engine."""
        num_tokens = self._vllm_config.model_config.get_vocab_size()
        if pull.first_token is None or 0 <= pull.first_token < num_tokens:
            return pull
        reason = f"the producer's first token is {pull.first_token}, not one of {num_tokens}"
        return replace(pull, failure=reason, first_token=None)

    def take_receipts(self) -> WorkerReport | None:
        report, self._report = self._report, None
        return report

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._port is not None:
            self._port.close()
