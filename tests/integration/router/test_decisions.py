"""What the router's real view of a controller answers operators: one that answers, hangs, dies."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray

from cluster.config import TandemConfig, parse_config
from cluster.load import RouterLoad
from cluster.names import RouterId
from cluster.reconfigure import InForce
from router import deployment
from router.deployment import ControllerView
from router.surface import Operations, operator_app

RUNNING = parse_config({"router": {"max_queued": 7}})
RECORDS = [{"seq": seq, "decision": {"reason": f"number {seq}"}} for seq in range(1, 8)]


def remote(call: Callable[..., Awaitable[Any]]) -> Any:
    """Return what an actor's method looks like to its callers."""
    return SimpleNamespace(remote=call)


class FakeController:
    """A controller actor that answers a router, and with `failure` no question of an operator."""

    def __init__(self, failure: Exception | None = None, is_hanging: bool = False) -> None:
        self._failure = failure
        self._is_hanging = is_hanging
        self.decisions = remote(self._decisions)
        self.state = remote(self._state)
        self.history = remote(self._history)
        self.follow = remote(self._follow)
        self.reconfigure = remote(self._reconfigure)

    async def _follow(self, load: dict[str, Any], known_version: int) -> dict[str, Any]:
        return {"version": 1, "workers": [], "health": (True, "serving")}

    async def _reconfigure(self, offered: InForce) -> TandemConfig:
        return RUNNING

    async def _answer(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_hanging:
            await asyncio.Event().wait()

    async def _state(self) -> dict[str, Any]:
        await self._answer()
        return {"name": "tandem"}

    async def _history(self, after: int) -> dict[str, Any]:
        await self._answer()
        return {"rows": [], "next": after}

    async def _decisions(self, after: int, limit: int) -> list[dict[str, Any]]:
        await self._answer()
        return [record for record in RECORDS if int(str(record["seq"])) > after][:limit]


async def get(path: str, controller: FakeController | None) -> httpx.Response:
    """Ask a router that knows `controller`, or that has not found one yet."""
    view = ControllerView(lambda: controller, InForce(TandemConfig()))
    if controller is not None:
        assert await view.ask(RouterLoad(RouterId("r"), 0.0)) == []
    operations = Operations(
        health=lambda: (True, "serving"),
        record=lambda _: None,
        recent=lambda _: [],
        pinned=dict,
        decisions=view.decisions,
        targets=view.targets,
        state=view.state,
        history=view.history,
    )
    transport = httpx.ASGITransport(operator_app(operations, {}))
    async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as client:
        return await client.get(path)


async def test_pages_follow_each_other_by_next() -> None:
    controller, after, seen = FakeController(), 0, []
    while page := (await get(f"/admin/decisions?after={after}&limit=3", controller)).json():
        seen += page["decisions"]
        if page["next"] == after:
            break
        after = page["next"]
    assert seen == RECORDS and after == 7


@pytest.mark.parametrize(
    ("controller", "says"),
    [
        (None, "does not answer this router"),
        (
            FakeController(ray.exceptions.ActorDiedError()),
            "the controller does not answer: ActorDiedError: The",
        ),
        (FakeController(is_hanging=True), "nothing within 0.05 s"),
    ],
)
@pytest.mark.parametrize("path", ["/admin/decisions", "/admin/state", "/admin/history?after=9"])
async def test_a_controller_that_is_down_is_a_503_that_says_so(
    path: str, controller: FakeController | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "_ANSWER_TIMEOUT_S", 0.05)
    answer = await get(path, controller)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert says in answer.json()["error"]["message"]


async def test_bad_parameters_do_not_reach_the_controller() -> None:
    broken = FakeController(AssertionError("it was asked"))
    for query in ("limit=0", "limit=x", "after=-1", "after=1e3"):
        assert (await get(f"/admin/decisions?{query}", broken)).status_code == 400
    for query in ("after=-1", "after=now", "after=1.5"):
        assert (await get(f"/admin/history?{query}", broken)).status_code == 400


async def test_state_and_history_come_from_the_controller() -> None:
    assert (await get("/admin/state", FakeController())).json() == {"name": "tandem"}
    page = (await get("/admin/history?after=1800000000", FakeController())).json()
    assert page == {"rows": [], "next": 1_800_000_000}


async def test_a_router_goes_by_what_the_controller_says_is_in_force() -> None:
    view = ControllerView(lambda: FakeController(), InForce(TandemConfig(), 1.0))
    assert await view.settle() == RUNNING


async def test_a_router_goes_by_its_own_configuration_while_nobody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment, "_SETTLE_S", 0.05)
    controller = FakeController()
    controller.reconfigure = remote(lambda _: asyncio.Event().wait())
    view = ControllerView(lambda: controller, InForce(TandemConfig(), 1.0))
    assert await view.settle() == TandemConfig()
