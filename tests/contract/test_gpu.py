"""Blocks in GPUs' memory and the ways between them; skipped where there is none."""

import signal
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from cluster.config import HandoffSection
from cluster.messages import Offer
from kv_transfer.arena import PAGE_BYTES, ArenaShape
from kv_transfer.cuda_ipc import CudaDevice, CudaIpcTransport
from kv_transfer.transports import arena_shape, transports_of
from tests.contract.handoff_sides import SECTION, Side, content, store_of
from tests.contract.other_process import heard
from tests.waiting import wait_for

NUM_GPUS = torch.cuda.device_count()

one_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs: NCCL joins no GPU to itself")
NAMES = ("first", "second")


def over(kind: str, **changes: object) -> HandoffSection:
    return SECTION.model_copy(update={"transports": (kind,), **changes})


def check_pulls(consumer: Side, offers: Iterable[Offer], kind: str) -> None:
    """Pull what a side of seed 1 holds, one after the other."""
    for offer in offers:
        consumer.pull(offer, range(200, 599))
        wait_for(consumer.has_ended(offer.handoff_id), 60)
        ended = consumer.pulls[offer.handoff_id]
        assert (ended.failure, ended.receipt.transport) == (None, kind)
    assert content(consumer.store, range(200, 599)) == content(store_of(1), range(1, 400))


def check_handoff(kind: str, theirs: str, ours: str) -> None:
    """Hand blocks over between two ports whose blocks are on these devices."""
    producer = Side(over(kind), 1, device=theirs)
    consumer = Side(over(kind), 2, device=ours)
    try:
        check_pulls(consumer, (producer.hold(name, range(1, 400)) for name in NAMES), kind)
    finally:
        producer.port.close()
        consumer.port.close()


def produce(kind: str, device: str, pipe: "Connection[Any, Any]") -> None:
    side = Side(over(kind), 1, device=device)
    for name in NAMES:
        pipe.send(side.hold(name, range(1, 400)))
    signal.pause()


@one_gpu
@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_blocks_of_a_gpu_go_through_pinned_memory_where_there_is_no_other_way(kind: str) -> None:
    check_handoff(kind, "cuda:0", "cuda:0")


@two_gpus
def test_blocks_go_from_gpu_to_gpu_over_nccl() -> None:
    check_handoff("nccl", "cuda:0", "cuda:1")


@pytest.mark.parametrize(
    "ours", [pytest.param("cuda:0", marks=one_gpu), pytest.param("cuda:1", marks=two_gpus)]
)
def test_blocks_go_from_process_to_process_over_cuda_ipc(other: Any, ours: str) -> None:
    """CUDA maps no memory in the process that it belongs to."""
    _, pipe = other(produce, "cuda_ipc", "cuda:0")
    consumer = Side(over("cuda_ipc"), 2, device=ours)
    try:
        check_pulls(consumer, (heard(pipe) for _ in NAMES), "cuda_ipc")
    finally:
        consumer.port.close()


@one_gpu
def test_a_producer_that_is_killed_takes_nothing_of_its_readers_along(other: Any) -> None:
    process, pipe = other(produce, "cuda_ipc", "cuda:0")
    consumer = Side(over("cuda_ipc", stall_timeout_s=1.0), 2, device="cuda:0")
    try:
        check_pulls(consumer, [heard(pipe)], "cuda_ipc")
        process.kill()
        process.join()
        consumer.pull(heard(pipe), range(200, 599))
        wait_for(consumer.has_ended("second"))
        assert "no data for" in (consumer.pulls["second"].failure or "")
        wait_for(lambda: not consumer.port._links)
        _, another = other(produce, "cuda_ipc", "cuda:0")
        heard(another)
        consumer.pulls.clear()
        check_pulls(consumer, [heard(another)], "cuda_ipc")
    finally:
        consumer.port.close()


@one_gpu
def test_memory_that_cannot_be_mapped_is_no_error_of_others() -> None:
    """Of this process's own, or behind a handle of nobody's."""
    shape = ArenaShape(16 * PAGE_BYTES, 4)
    here = CudaIpcTransport(shape, CudaDevice("cuda:0"))
    try:
        place, _, handle = here.address().rpartition("/")
        for address in (here.address(), f"{place}/{bytes(len(handle) // 2).hex()}"):
            assert here.attach(address) is None
        assert torch.ones(3, device="cuda:0").sum().item() == 3
    finally:
        here.close()


@one_gpu
def test_checksums_of_a_gpu_are_those_of_the_host() -> None:
    payload = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    on_gpu, on_host = store_of(1, "cuda:0"), store_of(1, "cpu")
    assert on_gpu.checksum(payload.to("cuda:0")) == on_host.checksum(payload)


@pytest.mark.parametrize(
    ("device", "named", "found"),
    [
        (None, ("gloo", "cuda_ipc", "nccl", "cma", "tcp"), ["cma", "tcp"]),
        ("cpu", ("cma", "shm"), ["shm"]),
        ("cpu", ("nccl", "gloo", "shm"), ["gloo", "shm"]),
        pytest.param(
            "cuda:0",
            ("gloo", "cuda_ipc", "nccl", "tcp"),
            ["cuda_ipc", "nccl", "tcp"],
            marks=one_gpu,
        ),
    ],
)
def test_ways_are_those_for_the_device(
    device: str | None, named: tuple[str, ...], found: list[str]
) -> None:
    store, section = store_of(1, device), SECTION.model_copy(update={"transports": named})
    transports = transports_of(section, arena_shape(section, store), store)
    assert [via.value for via in transports] == found
    for transport in transports.values():
        transport.close()


def test_an_engine_none_of_whose_ways_fit_does_not_start() -> None:
    store, section = store_of(1), SECTION.model_copy(update={"transports": ("nccl",)})
    with pytest.raises(ValueError, match="nccl cannot carry blocks in the host's memory; add shm"):
        transports_of(section, arena_shape(section, store), store)
