"""Blocks in GPUs' memory and the ways between them; skipped where there is none."""

import pytest
import torch

from kv_transfer.transports import arena_shape, transports_of
from tests.contract.handoff_sides import SECTION, Side, content, store_of
from tests.waiting import wait_for

NUM_GPUS = torch.cuda.device_count()

one_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs: NCCL joins no GPU to itself")


def check_handoff(kind: str, theirs: str, ours: str) -> None:
    """Hand blocks over between two ports whose blocks are on these devices."""
    section = SECTION.model_copy(update={"transports": (kind,)})
    producer = Side(section, 1, device=theirs)
    consumer = Side(section, 2, device=ours)
    try:
        for name in ("first", "second"):
            consumer.pull(producer.hold(name, range(1, 400)), range(200, 599))
            wait_for(consumer.has_ended(name), 60)
            assert consumer.pulls[name].failure is None
            assert consumer.pulls[name].receipt.transport == kind
        assert content(consumer.store, range(200, 599)) == content(store_of(1), range(1, 400))
    finally:
        producer.port.close()
        consumer.port.close()


@one_gpu
@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_blocks_of_a_gpu_go_through_pinned_memory_where_there_is_no_other_way(kind: str) -> None:
    check_handoff(kind, "cuda:0", "cuda:0")


@two_gpus
def test_blocks_go_from_gpu_to_gpu_over_nccl() -> None:
    check_handoff("nccl", "cuda:0", "cuda:1")


@one_gpu
def test_checksums_of_a_gpu_are_those_of_the_host() -> None:
    payload = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    on_gpu, on_host = store_of(1, "cuda:0"), store_of(1, "cpu")
    assert on_gpu.checksum(payload.to("cuda:0")) == on_host.checksum(payload)


@pytest.mark.parametrize(
    ("device", "named", "found"),
    [
        (None, ("gloo", "nccl", "cma", "tcp"), ["cma", "tcp"]),
        ("cpu", ("cma", "shm"), ["shm"]),
        ("cpu", ("nccl", "gloo", "shm"), ["gloo", "shm"]),
        pytest.param("cuda:0", ("gloo", "nccl", "tcp"), ["nccl", "tcp"], marks=one_gpu),
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
