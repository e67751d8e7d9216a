"""Workers are killed in every state while the pools change size: nothing lost, nothing left.

`pending` is left out: a worker in it has no process yet. Each victim is frozen first, so that it
is certain to be in its state when it is killed, in the controller's eyes too.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from autoscaler.ratio import Sizes
from cluster.ray_plane import controller_name, find_controller
from deploy.attached import deployment_actors, deployment_groups
from deploy.controller_link import ControllerLink, missing_for
from deploy.processes import ProcessId
from tests.background_load import BackgroundLoad
from tests.cut_streams import only_cut_streams_failed
from tests.on_cluster import ray_cluster, tandem_on
from tests.served import Served, wait_until

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

NAME = f"test-worker-loss-{os.getpid()}"
NUM_BLOCKS = 512
RATE, PROMPT_TOKENS, OUTPUT_TOKENS = 2.0, 100, 100
STANDBY = 1
FLAGS: dict[str, Any] = {
    "model.engine": "simulated",
    "model.max_model_len": 512,
    "model.block_size": 64,
    "simulated.num_blocks": NUM_BLOCKS,
    # Streams of 7 s: who leaves a pool still has some when its observation has ended.
    "simulated.decode_step_s": 0.07,
    # A warm-up hand-off takes long enough to be met.
    "simulated.prefill_tokens_per_s": 1000.0,
    "autoscaler.soft_in_s": 3.0,
    "cluster.standby": STANDBY,
    "router.records": 10_000,
}
REACHED_S, CONVERGED_S, LEVEL_S = 30.0, 60.0, 5.0

Worker = dict[str, Any]


class Fleet:
    """The deployment as its controller sees it, orders to it, and what was killed of it."""

    def __init__(self, link: ControllerLink) -> None:
        self._link = link
        self._sizes = Sizes(1, 1)
        self.killed: list[Worker] = []

    def workers(self) -> list[Worker]:
        workers: list[Worker] = self._link.status()["workers"]
        return workers

    def order(self, prefill: int, decode: int) -> None:
        self._sizes = Sizes(prefill, decode)
        self._link.scale(self._sizes)

    def freeze(self, state: str, role: str | None = None) -> Worker:
        """Return another worker that stays in `state`: its process has been stopped in it."""

        def find() -> Worker | None:
            for worker in self.workers():
                if worker["state"] != state or role not in (None, worker["role"]):
                    continue
                process = psutil.Process(worker["pid"])
                if process.status() != psutil.STATUS_STOPPED:
                    process.suspend()
                    if self.state_of(worker) == state:
                        return worker
                    process.resume()
            return None

        # Some states last for a fraction of a second.
        return wait_until(find, REACHED_S, f"a worker is {state}", poll_s=0.001)

    def state_of(self, worker: Worker) -> str | None:
        states = {each["worker_id"]: each["state"] for each in self.workers()}
        return states.get(worker["worker_id"])

    def kill(self, worker: Worker) -> None:
        psutil.Process(worker["pid"]).kill()
        self.killed.append(worker)

    def converge(self) -> None:
        """Return once the ordered workers are there and nobody else, on Ray's side too."""
        wait_until(lambda: self._missing() is None, CONVERGED_S, f"{self._sizes} serve")
        wait_until(self._is_tidy, CONVERGED_S, "nothing of the dead is left")

    def _missing(self) -> str | None:
        status = self._link.status()
        states = {worker["worker_id"]: worker["state"] for worker in status["workers"]}
        is_whole = len(states) == self._sizes.prefill + self._sizes.decode + STANDBY
        if not is_whole or "standby" not in states.values():
            return f"{states}"
        if dead := [w["worker_id"] for w in self.killed if w["worker_id"] in states]:
            return f"still listed: {dead}"
        return missing_for(status, self._sizes)

    def _is_tidy(self) -> bool:
        names = {f"{NAME}-{worker['worker_id']}" for worker in self.workers()}
        actors = {*names, controller_name(NAME)}
        is_gone = not any(ProcessId.of(worker["pid"]) for worker in self.killed)
        is_known = set(deployment_actors(NAME)) == actors and set(deployment_groups(NAME)) == names
        return is_gone and is_known


def kill_held(fleet: Fleet) -> None:
    """From 1P1D: a prefill worker waits for decode workers whose start is held up."""
    fleet.order(3, 3)
    slow = [fleet.freeze("starting", "decode") for _ in range(2)]
    fleet.kill(fleet.freeze("held", "prefill"))
    for worker in slow:
        psutil.Process(worker["pid"]).resume()


def kill_stopping(fleet: Fleet) -> None:
    """A worker that is not needed any more before it has started does not get to hear of it.

    Two start, one for a pool and one to stand by: either may be the one that goes.
    """
    fleet.order(4, 4)
    starting = [fleet.freeze("starting") for _ in range(2)]
    fleet.order(3, 3)

    def find() -> Worker | None:
        return next((each for each in starting if fleet.state_of(each) == "stopping"), None)

    worker = wait_until(find, REACHED_S, "one of them is stopping")
    fleet.kill(worker)
    starting.remove(worker)
    for other in starting:
        psutil.Process(other["pid"]).resume()


def kill_in(state: str, role: str | None, *order: int) -> Callable[[Fleet], None]:
    """Return what kills a worker of the role in that state, after an order if one is given."""

    def kill(fleet: Fleet) -> None:
        if order:
            fleet.order(*order)
        fleet.kill(fleet.freeze(state, role))

    return kill


# Each goes on from the sizes that the one before ended with.
KILLS = (
    kill_held,
    kill_in("ready", "prefill"),
    kill_in("ready", "decode"),
    kill_stopping,
    kill_in("standby", None),
    kill_in("flipping", "prefill", 4, 2),
    kill_in("soft_out", "decode", 4, 1),
    kill_in("starting", "decode", 4, 3),
    kill_in("draining", "decode", 4, 2),
    kill_in("warming", "decode", 4, 4),
)


@pytest.fixture
def served() -> Iterator[Served]:
    # Room for the largest pools, with those on their way out still there.
    with ray_cluster([{"num_cpus": 16}]) as cluster, tandem_on(cluster, NAME, FLAGS) as served:
        yield served


def test_a_worker_killed_in_any_state_is_made_up_for(served: Served) -> None:
    fleet = Fleet(ControllerLink(NAME, ray, find_controller(NAME)))
    fleet.converge()
    with BackgroundLoad(served, lambda _: RATE, PROMPT_TOKENS, OUTPUT_TOKENS) as load:
        for kill in KILLS:
            kill(fleet)
            fleet.converge()
    lost = [worker["worker_id"] for worker in fleet.killed]
    cut = only_cut_streams_failed(served, load.result(), lost)
    assert cut, "some streams were running on workers that were killed"
    wait_until(lambda: are_level(fleet.workers()), LEVEL_S, "every block is free again")


def are_level(workers: list[Worker]) -> bool:
    """Return whether no worker holds or uses a block; the engine itself keeps one."""
    return all(
        worker["num_held_blocks"] == 0 and worker["num_free_blocks"] == NUM_BLOCKS - 1
        for worker in workers
    )
