"""How soon a worker of a running deployment serves in another role, under a trickle of requests.

Sizes are ordered as `tandem scale` does; who served what, and when, is in the requests' records.
"""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from autoscaler.ratio import Sizes
from cluster.config import ClusterSection
from deploy.controller_link import ControllerLink, controller_of, missing_for
from tests.served import Served, tandem, wait_until

NAME = "bench-roles"
PERIOD_S = 0.1
PROMPT_TOKENS = 64
NEW_TOKENS = 4
# Long enough for every worker to have served in its present role.
SETTLE_S = 2.0
WITHIN_S = 90.0
MOST_RECORDS = 1000
PREFILL_HEAVY, DECODE_HEAVY, BOTH = Sizes(2, 1), Sizes(1, 2), Sizes(2, 2)
# What ends a worker's part in a request.
LAST_EVENT = {"prefill": "prefilled", "decode": "finished"}


@dataclass(frozen=True, slots=True)
class Part:
    """A worker's part in one request, and when it was done (`time.monotonic`)."""

    worker_id: str
    role: str
    done_at: float


@dataclass(frozen=True, slots=True)
class RoleTimes:
    """Seconds from the old role's last request done to the first one done in the new role, and
    from the order that activates a standby to the first request that it has served."""

    to_decode: list[float]
    to_prefill: list[float]
    standby: list[float]


class Trickle:
    """One request every `PERIOD_S`; `received` is when the answer to each id came."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._is_over = threading.Event()
        self._num_sent = 0
        self.received: dict[str, float] = {}
        self.failures: list[str] = []

    def run(self) -> None:
        asyncio.run(self._send_all())

    def end(self) -> None:
        self._is_over.set()

    def parts(self) -> list[Part]:
        """Return what workers have done for the requests answered since `forget`."""
        received = dict(self.received)
        answer = self._served.client.get(f"/admin/requests?limit={MOST_RECORDS}").json()
        parts = []
        for record in answer["requests"]:
            if (at := received.get(record["exchange_id"])) is None:
                continue
            stamps = {each["event"]: each["at_s"] for each in record["events"]}
            for role, event in LAST_EVENT.items():
                worker_id = record[f"{role}_worker"]
                if worker_id is not None:
                    done_at = at - stamps["finished"] + stamps[event]
                    parts.append(Part(worker_id, role, done_at))
        return parts

    def forget(self) -> None:
        self.received.clear()

    async def _send_all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self._served.url, timeout=60.0, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            while not self._is_over.is_set():
                self._num_sent += 1
                group.create_task(self._send(client, f"{NAME}-{self._num_sent}"))
                await asyncio.sleep(PERIOD_S)

    async def _send(self, client: httpx.AsyncClient, exchange_id: str) -> None:
        body = {
            "model": self._served.model,
            "prompt": [random.randrange(300, 4000) for _ in range(PROMPT_TOKENS)],
            "max_tokens": NEW_TOKENS,
            "ignore_eos": True,
        }
        headers = {"x-request-id": exchange_id}
        response = await client.post("/v1/completions", json=body, headers=headers)
        if response.status_code == 200:
            self.received[exchange_id] = time.monotonic()
        else:
            self.failures.append(f"{response.status_code}: {response.text}")


@contextmanager
def trickling(served: Served) -> Iterator[Trickle]:
    """Send requests from another thread for as long as the block runs; none may fail."""
    trickle = Trickle(served)
    thread = threading.Thread(target=trickle.run)
    thread.start()
    try:
        yield trickle
    finally:
        trickle.end()
        thread.join()
    assert not trickle.failures, trickle.failures


def roles_of(controller: ControllerLink) -> dict[str, str]:
    """Return the role of each worker that is in a pool, by id."""
    states = ("ready", "flipping")
    workers = controller.status()["workers"]
    return {w["worker_id"]: w["role"] for w in workers if w["state"] in states}


def settle(controller: ControllerLink, sizes: Sizes) -> None:
    """Return once these pools serve, beside one standby and nobody else."""

    def is_settled() -> bool:
        status = controller.status()
        others = [w["state"] for w in status["workers"] if w["state"] != "ready"]
        return missing_for(status, sizes) is None and others == ["standby"]

    wait_until(is_settled, WITHIN_S, f"{sizes} and a standby")


def time_change(controller: ControllerLink, trickle: Trickle, sizes: Sizes) -> float:
    """Order sizes that give one worker a new role; return how long until it has served in it,
    from its last request in its old role or, for a standby, from the order."""
    before = roles_of(controller)
    trickle.forget()
    time.sleep(SETTLE_S)
    ordered_at = time.monotonic()
    controller.scale(sizes)

    def change() -> tuple[str, str] | None:
        return next(iter(roles_of(controller).items() - before.items()), None)

    worker_id, role = wait_until(change, WITHIN_S, f"a worker takes a role for {sizes}")

    def parts(role: str | None) -> list[float]:
        return [p.done_at for p in trickle.parts() if (p.worker_id, p.role) == (worker_id, role)]

    wait_until(lambda: parts(role) or None, WITHIN_S, f"{worker_id} serves as {role} worker")
    # Answers overtake each other: what was done first may be answered a moment later.
    time.sleep(SETTLE_S)
    last_at = max(parts(before.get(worker_id)), default=ordered_at)
    return min(parts(role)) - last_at


def time_roles(rounds: int, **flags: Any) -> RoleTimes:
    """Run 2P1D and a standby; flip a worker there and back and activate the standby, `rounds`
    times each."""
    flags |= {"autoscaler__max_prefill": 2, "autoscaler__max_decode": 2, "cluster__standby": 1}
    # Whoever is scaled in leaves at once, so that the next round starts as this one did.
    flags |= {"prefill__workers": PREFILL_HEAVY.prefill, "autoscaler__soft_in_s": 0.5}
    times = RoleTimes([], [], [])
    steps = ((DECODE_HEAVY, times.to_decode), (PREFILL_HEAVY, times.to_prefill))
    with (
        tandem(NAME, **flags) as served,
        controller_of(ClusterSection(name=NAME)) as controller,
        trickling(served) as trickle,
    ):
        settle(controller, PREFILL_HEAVY)
        for _ in range(rounds):
            for sizes, taken in (*steps, (BOTH, times.standby)):
                taken.append(time_change(controller, trickle, sizes))
                settle(controller, sizes)
            controller.scale(PREFILL_HEAVY)
            settle(controller, PREFILL_HEAVY)
    return times
