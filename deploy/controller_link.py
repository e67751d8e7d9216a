"""Orders to the controller of a running deployment, and questions, from another process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoscaler.limits import Limits
from autoscaler.ratio import Sizes
from cluster.config import ClusterSection
from cluster.errors import TandemError, Unavailable, summarise
from deploy.connect import connect, connect_to
from deploy.state import DeploymentState

_TIMEOUT_S = 10.0
_POLL_S = 0.25


class ControllerLink:
    """One deployment's controller; every call raises `Unavailable` if it does not answer."""

    def __init__(self, name: str, ray: Any, actor: Any) -> None:
        self._name = name
        self._ray = ray
        self._actor = actor

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._ask(self._actor.status.remote())
        return status

    def scale(self, sizes: Sizes) -> None:
        """Hold both pools at these sizes, whatever the load."""
        self._ask(self._actor.scale.remote(sizes.prefill, sizes.decode))

    def unscale(self) -> None:
        """Take the order back."""
        self._ask(self._actor.unscale.remote())

    def rotate_keys(self) -> None:
        """Begin to replace the CURVE keys that the deployment made for itself."""
        self._ask(self._actor.rotate_keys.remote())

    def _ask(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer, timeout=_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            raise _unanswered(self._name, error) from None


@contextmanager
def controller_of(cluster: ClusterSection) -> Iterator[ControllerLink]:
    """Join the deployment's cluster for as long as the block runs: the one at `cluster.address`,
    as an app that `serve deploy` started has it, else the one of the deployment that runs here."""
    if cluster.address is not None:
        connect(cluster.address)
    else:
        connect_to(running_deployment(cluster.name))
    # Not earlier: what lets this process into the cluster is read when Ray is imported.
    import ray

    from cluster.ray_plane import find_controller

    try:
        try:
            actor = find_controller(cluster.name)
        except ValueError as error:
            raise _unanswered(cluster.name, error) from None
        yield ControllerLink(cluster.name, ray, actor)
    finally:
        ray.shutdown()


def _unanswered(name: str, error: Exception) -> Unavailable:
    """Return what to tell the operator: the cause of what the controller raised, if it did."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TandemError):
        return Unavailable(f"the controller of {name!r}: {cause}")
    return Unavailable(f"the controller of {name!r} does not answer: {summarise(error)}")


def running_deployment(name: str) -> DeploymentState:
    """Return where the deployment is; raise `TandemError` if none of this name runs here."""
    state = DeploymentState.read(name)
    if state is None:
        raise TandemError(f"no deployment named {name!r} runs here")
    return state


def desired_sizes(status: dict[str, Any]) -> Sizes:
    return Sizes(status["desired"]["prefill"], status["desired"]["decode"])


def limits_of(status: dict[str, Any]) -> Limits:
    """Return the bounds and the budget that the deployment was started with."""
    bounds, gpus = status["bounds"], status["gpus_per_worker"]
    (min_prefill, max_prefill), (min_decode, max_decode) = bounds["prefill"], bounds["decode"]
    return Limits(
        Sizes(min_prefill, min_decode),
        Sizes(max_prefill, max_decode),
        (gpus["prefill"], gpus["decode"]),
        status["gpu_budget"],
    )


def pinned_sizes(status: dict[str, Any]) -> Sizes | None:
    """Return the sizes ordered by hand, None while the load decides."""
    return None if status["pinned"] is None else Sizes.from_document(status["pinned"])


def missing_for(status: dict[str, Any], sizes: Sizes) -> str | None:
    """Return what still differs between the serving pools and `sizes`, None once they are it."""
    if desired_sizes(status) != sizes:
        return f"the controller still keeps {desired_sizes(status)}"
    serving = [worker["role"] for worker in status["workers"] if worker["state"] == "ready"]
    flipping = sum(worker["state"] == "flipping" for worker in status["workers"])
    now = Sizes(serving.count("prefill"), serving.count("decode"))
    if now == sizes and not flipping:
        return None
    reasons = [*status["unplaced"], *status["failed_starts"].values()]
    return "; ".join([f"{now} serve and {flipping} change their role", *reasons])


class NotReached(Unavailable):
    """The pools did not get to sizes that the controller was ordered to keep."""


def wait_for_sizes(
    link: ControllerLink,
    sizes: Sizes,
    limit_s: float,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Return once exactly these pools serve; raise `NotReached` with what is missing."""
    deadline = time.monotonic() + limit_s
    said = None
    while (missing := missing_for(link.status(), sizes)) is not None:
        if time.monotonic() > deadline:
            raise NotReached(f"{sizes} not there within {limit_s:.0f} s: {missing}")
        if missing != said:
            said = missing
            say(missing)
        time.sleep(_POLL_S)
