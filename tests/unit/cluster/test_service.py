"""Services: what the configuration makes of them, and where their workers stand."""

import pytest

from cluster.config import parse_config
from cluster.errors import ConfigError
from cluster.service import (
    Counts,
    RoleNeed,
    Service,
    service_of,
)
from cluster.topology import Level, Topology
from tests.unit.cluster.tree import (
    PREFILL,
    node,
    running,
    service,
    workers,
)


def test_a_ratio_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="service chat: a P:D ratio of 0:1 has no unit"):
        service(ratio=Counts(0, 1))


def test_the_configuration_makes_the_service() -> None:
    config = parse_config(
        {
            "cluster": {"name": "blue"},
            "prefill": {"gpus_per_worker": 2, "gpu_types": "L20, H20"},
            "placement": {"affinity": "s1", "priority": 3, "min_units": 0},
        }
    )
    made = service_of(config, Counts(2, 1))
    assert made == Service(
        "blue",
        RoleNeed(1, 2, ("L20", "H20")),
        RoleNeed(1),
        Counts(2, 1),
        priority=3,
        affinity=Level.S1,
        min_units=0,
    )


def test_workers_on_nodes_that_are_gone_are_in_no_group() -> None:
    tree = Topology([node("p/a/1")])
    assert running(tree, service(), workers(PREFILL, "p/a/gone")) == ()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"prefill": {"gpus_per_worker": 1, "gpu_types": "A,A"}}, "prefill.gpu_types: names must"),
        ({"decode": {"gpu_types": ["A"]}}, "decode: gpu_types are named but gpus_per_worker is 0"),
        ({"placement": {"affinity": "s3"}}, "placement.affinity: Input should be 's1', 's2' or"),
        ({"placement": {"min_units": -1}}, "placement.min_units"),
    ],
)
def test_settings_that_make_no_service(document: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(document)
