"""Deployments that share a cluster: two controllers, one store, one inventory; no Ray."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

import cluster.controller
from cluster.config import TandemConfig, parse_config
from cluster.controller import Controller
from cluster.controller_store import ControllerStore
from cluster.names import Role, WorkerId
from cluster.placer import TURN_KEY, SharedPlacer, worker_name
from cluster.service import Counts, RoleNeed, service_of
from cluster.topology import Node, nodes_from_ray
from cluster.worker_spec import Seat
from tests.integration.cluster.local_workers import LocalWorker, MemoryStore
from tests.integration.cluster.test_rescaling import PARTS, pools, sizes, states
from tests.waiting import until

CPUS = 4


@dataclass(eq=False)
class SeatedWorker(LocalWorker):
    """A worker on a node; like Ray, it waits for its seat until the node has room."""

    name: str = field(kw_only=True)
    node: str = field(kw_only=True)
    inventory: "Inventory" = field(kw_only=True)
    is_seated: bool = False

    async def seat(self) -> Seat:
        await until(lambda: self.is_killed or self.inventory.free(self.node) >= 1, 60.0)
        self.is_seated = True
        return replace(await super().seat(), node=self.node, host=self.node)


class Inventory:
    """Nodes of `CPUS` cores, by name, with their labels; one core is taken by each worker.

    `crowded` lists the nodes that at any moment were given more workers than they hold. What is
    reported is `delay_s` old.
    """

    def __init__(self, labels: Mapping[str, Mapping[str, str]], delay_s: float = 0.0) -> None:
        self._labels = labels
        self._delay_s = delay_s
        self.workers: list[SeatedWorker] = []
        self.crowded: list[str] = []
        self.asked: list[int] = []

    def alive(self) -> list[SeatedWorker]:
        return [worker for worker in self.workers if not worker.is_killed]

    def free(self, node: str) -> int:
        return CPUS - sum(worker.is_seated and worker.node == node for worker in self.alive())

    def nodes(self) -> tuple[Node, ...]:
        documents = [
            {"NodeID": name, "Alive": True, "Resources": {"CPU": CPUS}, "Labels": labels}
            for name, labels in self._labels.items()
        ]
        free = {name: {"CPU": self.free(name)} for name in self._labels}
        time.sleep(self._delay_s)  # in the planning thread
        return nodes_from_ray(documents, free)

    def held(self) -> set[str]:
        return {worker.name for worker in self.alive() if worker.is_seated}

    def ask_for(self, needs: Sequence[RoleNeed]) -> None:
        self.asked.append(len(needs))

    def add(self, worker: SeatedWorker) -> None:
        self.workers.append(worker)
        if Counter(each.node for each in self.alive())[worker.node] > CPUS:
            self.crowded.append(worker.node)


@dataclass
class Host:
    """Launches the workers of one deployment on the nodes of the inventory."""

    deployment: str
    inventory: Inventory
    launched: dict[WorkerId, SeatedWorker] = field(default_factory=dict)
    keys: None = None

    def launch(self, worker_id: WorkerId, role: Role, node_id: str | None) -> SeatedWorker:
        assert node_id is not None, "placement names a node"
        worker = SeatedWorker(
            worker_id,
            name=worker_name(self.deployment, worker_id),
            node=node_id,
            inventory=self.inventory,
        )
        self.inventory.add(worker)
        self.launched[worker_id] = worker
        return worker

    def attach(self, worker_id: WorkerId) -> SeatedWorker | None:
        return self.launched.get(worker_id)


def config(name: str, units: int, priority: int = 0) -> TandemConfig:
    return parse_config(
        {
            "cluster": {"name": name},
            "placement": {"priority": priority},
            "prefill": {"workers": units},
            "decode": {"workers": units},
            "model": {"engine": "simulated", "max_model_len": 512, "block_size": 16},
            "simulated": {"decode_step_s": 0.001},
            "autoscaler": {"soft_in_s": 600.0},
        }
    )


@asynccontextmanager
async def deployed(
    settings: TandemConfig, inventory: Inventory, store: MemoryStore
) -> AsyncIterator[Controller]:
    """Run a deployment, and take it down at the end of the block."""
    name = settings.cluster.name
    service = service_of(settings, Counts(*settings.autoscaler.ratio_pair))
    placer = SharedPlacer(service, store, inventory)
    host, notes = Host(name, inventory), ControllerStore(store, name)
    controller = Controller(settings, PARTS, host, notes, "127.0.0.1", placer)
    loop = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        await controller.drain_and_stop()
        await loop
    assert all(worker.is_killed for worker in host.launched.values())


def unplaced(controller: Controller) -> list[str]:
    reasons: list[str] = controller.status()["unplaced"]
    return reasons


def notes(controller: Controller, start: str) -> list[str]:
    return [event for _, event in controller.status()["events"] if event.startswith(start)]


def nodes_used(controller: Controller) -> Counter[str]:
    return Counter(worker["node"] for worker in controller.status()["workers"])


@pytest.fixture
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.controller, "PLACEMENT_PERIOD_S", 0.3)


@pytest.fixture
def inventory() -> Inventory:
    return Inventory({"n1": {}, "n2": {}})


@pytest.mark.usefixtures("short_periods")
async def test_a_higher_priority_takes_room_and_its_end_gives_it_back(
    inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    async with deployed(config("low", 4), inventory, store) as low:
        await until(lambda: sizes(low) == pools(4, 4))
        async with deployed(config("high", 2, priority=10), inventory, store) as high:
            await until(lambda: sizes(high) == pools(2, 2))
            assert sizes(low) == pools(2, 2)
            assert "soft_out" not in states(low).values(), "no observation period"
            assert unplaced(high) == []
            (reason,) = unplaced(low)
            assert reason == (
                "2 prefill and 2 decode workers given up: high (priority 10) needs the room of"
                " low (priority 0)"
            )
            monkeypatch.setattr(cluster.controller, "YIELD_S", 0.5)
            await until(lambda: unplaced(low) and unplaced(low) != [reason])
            (reason,) = unplaced(low)
            assert "no s2 domain has room for 1 prefill and 1 decode workers" in reason
            assert sizes(low) == sizes(high) == pools(2, 2)
        await until(lambda: sizes(low) == pools(4, 4))
        await until(lambda: unplaced(low) == [])
    assert inventory.crowded == []


@pytest.mark.usefixtures("short_periods")
async def test_the_lower_priority_keeps_its_least_size(inventory: Inventory) -> None:
    store = MemoryStore()
    async with deployed(config("low", 4), inventory, store) as low:
        await until(lambda: sizes(low) == pools(4, 4))
        async with deployed(config("high", 4, priority=10), inventory, store) as high:
            await until(lambda: sizes(high) == pools(3, 3))
            await until(lambda: any("no s2 domain has room" in why for why in unplaced(high)))
            assert sizes(low) == pools(1, 1)
            assert low.health() == (True, "serving")
            # What was given up does not count against a size ordered meanwhile.
            low.scale(pools(1, 1))
            await until(lambda: low.status()["desired"] == {"prefill": 1, "decode": 1})
            await asyncio.sleep(1.0)
            assert sizes(low) == pools(1, 1)
    assert inventory.crowded == []


@pytest.mark.usefixtures("short_periods")
async def test_a_higher_priority_does_not_wait_for_an_observation_period(
    inventory: Inventory,
) -> None:
    store = MemoryStore()
    async with deployed(config("low", 4), inventory, store) as low:
        await until(lambda: sizes(low) == pools(4, 4))
        low.scale(pools(2, 2))
        await until(lambda: list(states(low).values()).count("soft_out") == 4)
        async with deployed(config("high", 2, priority=10), inventory, store) as high:
            await until(lambda: sizes(high) == pools(2, 2))
            assert sizes(low) == pools(2, 2)
            assert unplaced(low) == []
    assert inventory.crowded == []


@pytest.mark.usefixtures("short_periods")
async def test_deployments_that_start_together_share_without_crowding() -> None:
    inventory, store = Inventory({"n1": {}, "n2": {}}, delay_s=0.05), MemoryStore()
    async with (
        deployed(config("low", 4), inventory, store) as low,
        deployed(config("high", 3, priority=10), inventory, store) as high,
    ):
        await until(lambda: sizes(high) == pools(3, 3), 30.0)
        await until(lambda: sizes(low) == pools(1, 1))
        await until(lambda: unplaced(low))
        assert inventory.crowded == []


@pytest.mark.usefixtures("short_periods")
async def test_a_service_larger_than_the_cluster_says_so_once(inventory: Inventory) -> None:
    async with deployed(config("large", 6), inventory, MemoryStore()) as large:
        await until(lambda: sizes(large) == pools(4, 4))
        reason = (
            "6 prefill and 6 decode workers need 0 GPUs and 12 CPUs; all nodes they may use have"
            " 0 GPUs and 8 CPUs"
        )
        await until(lambda: unplaced(large) == [reason])
        await asyncio.sleep(1.0)
        assert unplaced(large) == [reason]
        assert notes(large, "no place") == [f"no place: {reason}"]
        assert nodes_used(large) == {"n1": CPUS, "n2": CPUS}
        assert inventory.asked[-1] == 12
    assert inventory.crowded == []


@pytest.mark.usefixtures("short_periods")
async def test_a_node_with_an_unknown_label_takes_no_worker_and_is_named() -> None:
    inventory = Inventory({"n1": {}, "n2": {"tandem/S2": "pod-1"}})
    async with deployed(config("chat", 3), inventory, MemoryStore()) as chat:
        await until(lambda: sizes(chat) == pools(2, 2) and unplaced(chat))
        (reason,) = unplaced(chat)
        fault = "n2: unknown label tandem/S2 (nearest known label: tandem/s2)"
        assert f"(1 node left out: {fault})" in reason
        assert nodes_used(chat) == {"n1": CPUS}


def test_the_turn_of_a_controller_that_died_ends(inventory: Inventory) -> None:
    store, settings, now = MemoryStore(), config("chat", 1), time.time()
    store.put(TURN_KEY, str(now - 60.0).encode())
    placer = SharedPlacer(service_of(settings, Counts(1, 1)), store, inventory)
    assert len(placer.plan([], Counts(1, 1), now).slots) == 2
    assert store.get(TURN_KEY) is None
