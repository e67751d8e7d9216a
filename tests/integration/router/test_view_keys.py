"""Routers learn the CURVE keys with the list of workers, and again when they have changed."""

from typing import Any

from cluster.config import TandemConfig
from cluster.keyring import Keyring
from cluster.load import RouterLoad
from cluster.names import RouterId
from cluster.reconfigure import InForce
from router.deployment import ControllerView
from tests.integration.router.test_decisions import FakeController, remote


class KeyedController(FakeController):
    """Says in each answer which key is in use, and the ring to who asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Keyring.generate()
        self.num_asked = 0
        self.keys = remote(self._keys)

    async def _keys(self) -> Keyring:
        self.num_asked += 1
        return self.ring

    async def _follow(self, load: dict[str, Any], known_version: int) -> dict[str, Any]:
        answer = await super()._follow(load, known_version)
        return {**answer, "key": self.ring.used.name}


async def test_the_ring_comes_before_the_workers_and_only_when_it_is_another_one() -> None:
    controller = KeyedController()
    view = ControllerView(lambda: controller, InForce(TandemConfig()))
    for _ in range(3):
        assert await view.ask(RouterLoad(RouterId("r"), 0.0)) == []
        assert view.ring() == controller.ring
    assert controller.num_asked == 1
    controller.ring = controller.ring.with_new()
    await view.ask(RouterLoad(RouterId("r"), 0.0))
    assert controller.num_asked == 1, "routers only connect: what is accepted is not theirs to know"
    controller.ring = controller.ring.using_newest()
    await view.ask(RouterLoad(RouterId("r"), 0.0))
    assert controller.num_asked == 2 and view.ring() == controller.ring
