"""`tandem calibrate`: finds by pressure which P:D split carries most, and writes it down.

It takes the deployment over while it runs: other load on it spoils the measurement.
"""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autoscaler.calibration import (
    Choice,
    Measurement,
    Objectives,
    SplitResult,
    choose,
    next_clients,
    splits,
    summarise,
)
from autoscaler.ratio import Sizes
from cluster.config import TandemConfig
from cluster.errors import ConfigError, TandemError
from deploy.access import Access
from deploy.calibration_plot import draw
from deploy.config_edit import read_document, write_settings
from deploy.controller_link import (
    ControllerLink,
    NotReached,
    controller_of,
    desired_sizes,
    limits_of,
    pinned_sizes,
    running_deployment,
    wait_for_sizes,
)
from deploy.loadtest.endpoint import discover
from deploy.loadtest.prompts import FileTokenizer, PromptSource, read_text
from deploy.pressure import Pressure, press
from deploy.status import table

# One process cannot follow more streams than this without becoming the bottleneck itself.
_MOST_CLIENTS = 512
# An order is taken up at the controller's next tick.
_ORDER_S = 10.0
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What is asked: total workers, objectives, lengths in tokens, seconds per load."""

    total: int
    objectives: Objectives
    input_tokens: int
    output_tokens: int
    duration_s: float
    config_out: Path
    plot: Path

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what cannot be measured."""
        if self.total < 2:
            raise ConfigError("--total must be at least 2: one worker in each pool")
        numbers = (self.objectives.ttft_s, self.objectives.tbt_s, self.duration_s)
        if min(*numbers, self.input_tokens, self.output_tokens - 1) <= 0:
            raise ConfigError(
                "objectives, lengths and --duration must be positive, outputs above 1"
            )


@dataclass(slots=True)
class Sweep:
    """What was measured so far, in order."""

    measured: list[Measurement] = field(default_factory=list)
    results: list[SplitResult] = field(default_factory=list)


def run(config: TandemConfig, plan: CalibrationPlan, say: Callable[[str], None] = print) -> int:
    """Calibrate the running deployment; return 1 if no split holds the objectives."""
    state = running_deployment(config.cluster.name)
    _require_matching_signal(plan.config_out)
    pressure = _pressure(config, plan, state.access)
    source = PromptSource(FileTokenizer(config.model.path), read_text(), seed=0)
    sweep = Sweep()

    def measure(sizes: Sizes, clients: int) -> Measurement:
        return press(pressure, source, sizes, clients, plan.objectives)

    with controller_of(config.cluster) as controller:
        # Ray has taken SIGTERM; ended by either signal, the pools go back all the same.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _sweep(controller, config, plan, measure, sweep, say)
        except KeyboardInterrupt:
            say("stopped; nothing is written")
            return 130
    return _conclude(plan, sweep, say)


def _pressure(config: TandemConfig, plan: CalibrationPlan, access: Access) -> Pressure:
    endpoint = discover(access)
    needed, context = plan.input_tokens + plan.output_tokens, endpoint.context_tokens
    if context is not None and needed > context:
        raise ConfigError(f"prompt and output of {needed} tokens exceed the context of {context}")
    quantile = config.autoscaler.latency_quantile
    lengths = (plan.input_tokens, plan.output_tokens)
    return Pressure(endpoint, *lengths, plan.duration_s, quantile)


def _require_matching_signal(path: Path) -> None:
    """Refuse, before minutes of load, to write a target that the file's signal does not have."""
    _, document = read_document(path)
    section = document.get("autoscaler") or {}
    name = section.get("signal", "decode_tps") if isinstance(section, dict) else "decode_tps"
    if name != "decode_tps":
        raise ConfigError(f"{path}: calibration is for signal decode_tps, not {name}")


def _sweep(
    controller: ControllerLink,
    config: TandemConfig,
    plan: CalibrationPlan,
    measure: Callable[[Sizes, int], Measurement],
    sweep: Sweep,
    say: Callable[[str], None],
) -> None:
    """Measure every split and leave the pools as they were: to the load, or held as by hand.

    A split that does not come about carries nothing; the others are measured all the same.
    """
    status = controller.status()
    pinned = pinned_sizes(status)
    before, candidates = desired_sizes(status), splits(plan.total, limits_of(status))
    if not candidates:
        raise ConfigError(f"no split of {plan.total} workers is within the deployment's bounds")
    say(f"{len(candidates)} splits of {plan.total} workers, {plan.duration_s:g} s per load")
    try:
        for sizes in candidates:
            controller.scale(sizes)
            try:
                wait_for_sizes(controller, sizes, config.cluster.start_timeout_s)
            except NotReached as error:
                say(f"  {error}")
                sweep.results.append(SplitResult(sizes, None, str(error)))
                continue
            _measure_split(sizes, plan, measure, sweep, say)
    finally:
        controller.scale(pinned or before)
        if pinned is None:
            _wait_until_ordered(controller, before)
            controller.unscale()


def _measure_split(
    sizes: Sizes,
    plan: CalibrationPlan,
    measure: Callable[[Sizes, int], Measurement],
    sweep: Sweep,
    say: Callable[[str], None],
) -> None:
    measured: list[Measurement] = []
    known = [result.best.clients for result in sweep.results if result.best is not None]
    # The neighbouring split's edge is not far.
    first = max(plan.total, known[-1] // 2) if known else plan.total
    while clients := next_clients(measured, plan.objectives, first, _MOST_CLIENTS):
        measured.append(measure(sizes, clients))
        say(f"  {sizes}  {_gist(measured[-1], plan.objectives)}")
    sweep.measured += measured
    sweep.results.append(summarise(sizes, measured, plan.objectives))


def _gist(each: Measurement, objectives: Objectives) -> str:
    ends = " and ".join(each.faults(objectives)) or "held"
    latencies = f"TTFT {each.ttft_s:.3g} s, TBT {each.tbt_s:.3g} s"
    return f"{each.clients} clients: {each.decode_tps:.4g} tokens/s, {latencies}: {ends}"


def _wait_until_ordered(controller: ControllerLink, sizes: Sizes) -> None:
    """An order that is taken back before the controller has seen it would be none."""
    deadline = time.monotonic() + _ORDER_S
    while desired_sizes(controller.status()) != sizes and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _write_plot(plan: CalibrationPlan, sweep: Sweep, choice: Choice | None) -> None:
    try:
        plan.plot.write_text(draw(sweep.measured, sweep.results, choice, plan.objectives))
    except OSError as error:
        raise TandemError(f"{plan.plot}: {error.strerror}") from None


def _conclude(plan: CalibrationPlan, sweep: Sweep, say: Callable[[str], None]) -> int:
    choice = choose(sweep.results)
    for each in table(_rows(sweep.results, choice)):
        say(each)
    if choice is None:
        _write_plot(plan, sweep, choice)
        print("tandem: error: no split holds the objectives", file=sys.stderr, flush=True)
        return 1
    settings = {"ratio": choice.ratio, "target_per_worker": choice.target_per_worker}
    try:
        write_settings(plan.config_out, "autoscaler", settings)
    except ConfigError as error:
        raise TandemError(f"{error} (found {settings})") from None
    _write_plot(plan, sweep, choice)
    lengths = plan.input_tokens / plan.output_tokens
    say(choice.reason)
    say(f"{plan.config_out}: {settings}; holds at {lengths:.4g} prompt tokens per output token")
    say(f"plot: {plan.plot}")
    return 0


def _rows(results: list[SplitResult], choice: Choice | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]]
    rows = [("", "split", "clients", "tokens/s", "per D", "TTFT s", "TBT s", "ended by")]
    for result in results:
        is_chosen = choice is not None and result.sizes == choice.sizes
        best = result.best
        figures: tuple[str, ...] = ("-",) * 5
        if best is not None:
            per_worker = best.decode_tps / best.sizes.decode
            numbers = (best.decode_tps, per_worker, best.ttft_s, best.tbt_s)
            figures = (str(best.clients), *(f"{number:.4g}" for number in numbers))
        rows.append(("*" if is_chosen else "", str(result.sizes), *figures, result.reason))
    return rows
