"""`tandem scale`: pool sizes by hand, on the autoscaler's own path; `--auto` takes them back."""

from collections.abc import Callable
from dataclasses import dataclass

from autoscaler.ratio import Sizes
from cluster.config import ClusterSection
from cluster.errors import ConfigError
from deploy.controller_link import (
    ControllerLink,
    controller_of,
    desired_sizes,
    limits_of,
    wait_for_sizes,
)


@dataclass(frozen=True, slots=True)
class ScaleOrder:
    """What the operator asks for; a pool without a number keeps its size.

    `wait_s` is how long to wait until the pools are there, None not at all.
    """

    prefill: int | None = None
    decode: int | None = None
    is_auto: bool = False
    wait_s: float | None = None

    def __post_init__(self) -> None:
        """Raise `ConfigError` unless it says one thing."""
        is_sized = self.prefill is not None or self.decode is not None
        if is_sized == self.is_auto:
            raise ConfigError("give --prefill and --decode, or --auto")
        if self.is_auto and self.wait_s is not None:
            raise ConfigError("--wait is for sizes: with --auto the load decides")


def run(cluster: ClusterSection, order: ScaleOrder, say: Callable[[str], None] = print) -> int:
    """Give the order to the deployment; return the exit status."""
    with controller_of(cluster) as controller:
        if order.is_auto:
            _leave_to_the_load(controller, say)
        else:
            _hold(controller, order, say)
    return 0


def _leave_to_the_load(controller: ControllerLink, say: Callable[[str], None]) -> None:
    controller.unscale()
    status = controller.status()
    mode = status["autoscaler"]
    then = "the load decides" if mode == "act" else f"they stay (autoscaler.mode is {mode})"
    say(f"pools are no longer held at {desired_sizes(status)}: {then}")


def _hold(controller: ControllerLink, order: ScaleOrder, say: Callable[[str], None]) -> None:
    status = controller.status()
    present = desired_sizes(status)
    sizes = Sizes(order.prefill or present.prefill, order.decode or present.decode)
    faults = limits_of(status).faults(sizes)
    if faults:
        raise ConfigError(f"{sizes} is refused: {'; '.join(faults)}")
    controller.scale(sizes)
    say(f"pools are held at {sizes}, were {present}; `tandem scale --auto` takes that back")
    if order.wait_s is not None:
        wait_for_sizes(controller, sizes, order.wait_s, say)
        say(f"{sizes} serve")
