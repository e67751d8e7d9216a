"""Whatever is not placed has one reason, the one that is hardest to remedy."""

import pytest

from cluster.placement import Direction, Request
from cluster.service import (
    Counts,
    RoleNeed,
)
from cluster.shortage import Cause
from cluster.topology import Node, Topology
from tests.unit.cluster.tree import (
    ONE_GPU,
    mixed_cluster,
    node,
    out,
    place,
    service,
    started,
    why,
)


@pytest.mark.parametrize(
    ("prefill", "ratio", "size", "cause", "reason"),
    [
        (
            RoleNeed(1, 1, ("H20", "L20")),
            Counts(1, 1),
            (1, 1),
            Cause.NO_SUCH_NODE,
            "prefill: no node has GPUs of type H20 or L20; the cluster has A, B",
        ),
        (
            RoleNeed(1, 8),
            Counts(1, 1),
            (1, 1),
            Cause.WORKER_TOO_LARGE,
            "a prefill worker needs 8 GPUs and 1 CPUs on one node;"
            " the largest node has 4 GPUs and 64 CPUs",
        ),
        (
            ONE_GPU,
            Counts(9, 8),
            (9, 8),
            Cause.UNIT_TOO_LARGE,
            "9 prefill and 8 decode workers do not fit into any one s2 domain, even an empty one",
        ),
        (
            ONE_GPU,
            Counts(1, 1),
            (30, 30),
            Cause.SERVICE_TOO_LARGE,
            "30 prefill and 30 decode workers need 60 GPUs and 60 CPUs;"
            " all nodes they may use have 48 GPUs and 768 CPUs",
        ),
    ],
)
def test_what_no_waiting_helps(
    prefill: RoleNeed, ratio: Counts, size: tuple[int, int], cause: Cause, reason: str
) -> None:
    plan = place(mixed_cluster(), out(service(prefill=prefill, ratio=ratio), *size))
    assert why(plan) == (cause, reason)
    assert Counts(*size) == started(plan) + plan.unplaced[0].size


def test_nodes_left_out_are_named_in_the_reason() -> None:
    faulty = Node("n1", cpus=8, free_cpus=8, fault="unknown label tandem/s3")
    tree = Topology([faulty, node("p/a/2")])
    _, reason = why(place(tree, out(service(), 3, 3)))
    assert reason.endswith("(1 node left out: n1: unknown label tandem/s3)")


def test_no_free_gpus_then_some() -> None:
    """A clock walked through cycles: full, room for one unit, room for all."""
    owner, wanted = service(), Counts(2, 2)
    for free, placed in ((0, 0), (2, 1), (3, 1), (4, 2)):
        plan = place(Topology([node("p/a/1", free=free)]), Request(Direction.OUT, owner, wanted))
        assert started(plan) == Counts(placed, placed)
        assert len(plan.unplaced) == (placed < 2)


def test_an_empty_cluster() -> None:
    cause, reason = why(place(Topology([]), out(service(), 1, 1)))
    assert cause is Cause.NO_SUCH_NODE
    assert reason == "prefill: no node has GPUs; the cluster has no GPUs"


def test_one_role_alone_may_be_larger_than_the_nodes_it_may_use() -> None:
    owner = service(prefill=RoleNeed(1, 1, ("B",)), ratio=Counts(1, 1))
    assert why(place(mixed_cluster(), out(owner, 20, 20))) == (
        Cause.SERVICE_TOO_LARGE,
        "20 prefill workers need 20 GPUs and 20 CPUs;"
        " all nodes they may use have 16 GPUs and 256 CPUs",
    )
