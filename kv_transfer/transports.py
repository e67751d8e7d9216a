"""The transports of one port: those of its configuration that its blocks can go by."""

from collections.abc import Callable

from cluster.config import HandoffSection
from kv_transfer.arena import ArenaShape
from kv_transfer.blocks import BlockStore
from kv_transfer.protocol import Via
from kv_transfer.shm import ShmTransport
from kv_transfer.tcp import TcpTransport
from kv_transfer.transport import Transport


def arena_shape(section: HandoffSection, store: BlockStore) -> ArenaShape:
    """Return an arena whose slots hold a chunk each; a small store needs a small one."""
    largest_block = max(group.block_bytes for group in store.layout.groups)
    chunk_bytes = max(largest_block, min(section.chunk_bytes, store.total_bytes))
    return ArenaShape.for_chunks(chunk_bytes, min(section.arena_mib << 20, store.total_bytes))


# The device that blocks must be on; the other ways take them from anywhere, through the host.
_DEVICES = {Via.GLOO: "cpu", Via.CUDA_IPC: "cuda", Via.NCCL: "cuda"}


def transports_of(
    section: HandoffSection, shape: ArenaShape, store: BlockStore
) -> dict[Via, Transport]:
    """Return what `section` names, in its order, as far as it is for blocks like these.

    Raises `ValueError` if nothing is.
    """
    kinds: dict[Via, Callable[[], Transport]] = {
        Via.CMA: lambda: _over_cma(store),
        Via.SHM: lambda: ShmTransport(shape),
        Via.TCP: lambda: TcpTransport(shape.num_slots),
        Via.GLOO: lambda: _over_gloo(section, shape),
        Via.CUDA_IPC: lambda: _over_cuda_ipc(shape, store),
        Via.NCCL: lambda: _over_nccl(section, shape, store),
    }
    vias = [Via(name) for name in section.transports]
    device = None if store.device is None else store.device.partition(":")[0]
    fitting = [
        via
        for via in vias
        if _DEVICES.get(via, device) == device and not (via.is_in_place and store.regions() is None)
    ]
    if not fitting:
        where = f"in tensors on {store.device}" if store.device else "in the host's memory"
        named = ",".join(section.transports)
        raise ValueError(f"handoff.transports: {named} cannot carry blocks {where}; add shm or tcp")
    return {via: kinds[via]() for via in fitting}


# Numpy is imported by those who have arrays, torch by those who have tensors.


def _over_cma(store: BlockStore) -> Transport:
    from kv_transfer.cma import CmaTransport

    regions = store.regions()
    assert regions is not None
    return CmaTransport(regions)


def _over_gloo(section: HandoffSection, shape: ArenaShape) -> Transport:
    from kv_transfer.channels import ChannelTransport
    from kv_transfer.gloo import GlooBackend

    return ChannelTransport(GlooBackend(section.bind_host, section.stall_timeout_s), shape)


def _over_cuda_ipc(shape: ArenaShape, store: BlockStore) -> Transport:
    from kv_transfer.cuda_ipc import CudaDevice, CudaIpcTransport

    return CudaIpcTransport(shape, CudaDevice(str(store.device)))


def _over_nccl(section: HandoffSection, shape: ArenaShape, store: BlockStore) -> Transport:
    from kv_transfer.channels import ChannelTransport
    from kv_transfer.nccl import NcclBackend

    return ChannelTransport(NcclBackend(str(store.device), section.stall_timeout_s), shape)
