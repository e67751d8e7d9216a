"""The `tandem` command: starts, shows, sizes, calibrates, loads and stops deployments."""

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.config import TandemConfig
from cluster.errors import ConfigError, TandemError
from deploy import down as cleaning
from deploy import signals
from deploy.flags import OneLineParser, add_config_flags, config_from
from deploy.keys import add_command as add_keys
from deploy.loadtest.command import add_command as add_loadtest
from deploy.session import open_session

_STARTED_AT = time.monotonic()
_POOLS = ("prefill", "decode")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        config = config_from(parsed)
    except ConfigError as error:
        parsed.parser.error(str(error))
    try:
        return int(parsed.run(config, parsed))
    except TandemError as error:
        return _report(error)


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="tandem", description="Serve a model on two coordinated pools.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, about in (
        ("serve", run_serve, "start a deployment and stay up until Ctrl-C"),
        ("demo", run_demo, "start a deployment, replay a slice of a trace, report, stop"),
        ("status", run_status, "show a running deployment's workers"),
        ("scale", run_scale, "hold the pools at sizes given by hand, or leave them to the load"),
        ("decisions", run_decisions, "show what the autoscaler decided and why"),
        ("replay", run_replay, "put a recorded decision file through the policy again"),
        ("calibrate", run_calibrate, "find the P:D ratio and the target per worker by pressure"),
        ("down", run_down, "stop a deployment and clean up whatever it left"),
    ):
        usage = f"tandem {name} {'FILE ' if name == 'replay' else ''}[flags]"
        command = commands.add_parser(
            name, help=about, description=about, usage=usage, allow_abbrev=False
        )
        command.set_defaults(run=run, parser=command)
        _add_own_flags(name, command)
        add_config_flags(command)
    add_loadtest(commands)
    add_keys(commands)
    return parser


def _add_own_flags(name: str, command: argparse.ArgumentParser) -> None:
    if name in ("serve", "demo"):
        command.add_argument("--verbose", action="store_true", help="show the workers' logs")
    if name == "demo":
        command.add_argument(
            "--requests", type=int, default=48, help="requests to replay (default: 48)"
        )
        command.add_argument(
            "--rate-scale",
            type=float,
            default=1.0,
            help="replay this many times as fast as recorded (default: 1)",
        )
    if name in ("status", "decisions"):
        command.add_argument("--json", action="store_true", help="print JSON")
    if name == "decisions":
        command.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
        command.add_argument(
            "--after", type=int, default=0, metavar="N", help="leave out those up to number N"
        )
    if name == "scale":
        command.add_argument("--auto", action="store_true", help="take an order back")
        command.add_argument("--wait", action="store_true", help="return when the pools are there")
    if name == "replay":
        command.add_argument("file", type=Path, metavar="FILE", help="decision file (JSON lines)")
        command.add_argument(
            "--rerun",
            action="store_true",
            help="list what these settings decide otherwise, each decision resting on the last",
        )
    if name == "calibrate":
        _add_calibration_flags(command)
    if name == "down":
        command.add_argument("--all", action="store_true", help="every deployment found here")


def _add_calibration_flags(command: argparse.ArgumentParser) -> None:
    for flag, kind, about in (
        ("--total", int, "workers in both pools together"),
        ("--slo-ttft", float, "objective for TTFT in seconds"),
        ("--slo-tbt", float, "objective for the time between tokens in seconds"),
        ("--input-tokens", int, "prompt length"),
        ("--output-tokens", int, "output length"),
        ("--config-out", Path, "YAML file that gets the result; the rest of it stays"),
    ):
        metavar = "FILE" if kind is Path else "N" if kind is int else "S"
        command.add_argument(flag, type=kind, required=True, metavar=metavar, help=about)
    command.add_argument(
        "--duration", type=float, default=10.0, metavar="S", help="seconds per load (default: 10)"
    )
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="SVG (default: beside --config-out)"
    )


def run_serve(config: TandemConfig, parsed: argparse.Namespace) -> int:
    return _with_deployment(config, parsed, _stay_up)


def run_demo(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.demo import DemoPlan, run

    plan = DemoPlan(parsed.requests, parsed.rate_scale)
    return _with_deployment(config, parsed, lambda each: run(config, each.access, plan))


def run_status(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.state import DeploymentState
    from deploy.status import read_status, show

    status = read_status(config.cluster)
    state = DeploymentState.read(config.cluster.name)
    url = state.url if state else None
    print(json.dumps(status, indent=2) if parsed.json else show(status, url))
    return 0 if status["healthy"] else 1


def run_scale(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.scale import ScaleOrder, run

    # The flags of the pools' configuration; their defaults are no order.
    is_given = {pool: getattr(parsed, f"{pool}.workers") is not None for pool in _POOLS}
    order = ScaleOrder(
        prefill=config.prefill.workers if is_given["prefill"] else None,
        decode=config.decode.workers if is_given["decode"] else None,
        is_auto=parsed.auto,
        wait_s=config.cluster.start_timeout_s if parsed.wait else None,
    )
    return run(config.cluster, order, _print)


def run_decisions(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.decisions import DecisionsView, run

    view = DecisionsView(max(0, parsed.after), parsed.follow, parsed.json)
    return run(config.cluster.name, view, _print)


def run_replay(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.replay import run

    return run(parsed.file, config.autoscaler, parsed.rerun, _print)


def run_calibrate(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from autoscaler.calibration import Objectives
    from deploy.calibrate import CalibrationPlan, run

    plan = CalibrationPlan(
        parsed.total,
        Objectives(parsed.slo_ttft, parsed.slo_tbt),
        parsed.input_tokens,
        parsed.output_tokens,
        parsed.duration,
        parsed.config_out,
        parsed.plot or parsed.config_out.with_suffix(".svg"),
    )
    return run(config, plan, _print)


def run_down(config: TandemConfig, parsed: argparse.Namespace) -> int:
    names = cleaning.known_names() if parsed.all else [config.cluster.name]
    for name in names:
        print(cleaning.take_down(name), flush=True)
    return 0


def _with_deployment(
    config: TandemConfig, parsed: argparse.Namespace, use: Callable[[Any], int]
) -> int:
    """Start a deployment, `use` it, and stop it, however either ends."""
    cleaning.clean_up_before_start(config.cluster.name, _say)
    signals.catch()
    session = open_session(config)
    from deploy.app import Deployment

    deployment = Deployment(config, session, _say, parsed.verbose)
    status, failure = 0, None
    try:
        deployment.start()
        status = use(deployment)
    except (signals.Interrupted, KeyboardInterrupt):
        pass
    except TandemError as error:
        failure = error
    except Exception:
        # A bug of ours or of Ray's: it is shown, and everything is stopped all the same.
        traceback.print_exc()
        status = 1
    signals.ignore()
    _say("stopping")
    is_clean = deployment.stop()
    _say("stopped")
    status = _report(failure) if failure is not None else status
    if not is_clean:
        os._exit(status)
    return status


def _stay_up(deployment: Any) -> int:
    _say(f"endpoint: {deployment.url}/v1 (Ctrl-C stops)")
    print(f"\n{deployment.example()}\n", flush=True)
    deployment.watch(threading.Event())
    return 0


def _report(error: TandemError) -> int:
    print(f"tandem: error: {error}", file=sys.stderr, flush=True)
    return 1


def _print(line: str) -> None:
    print(line, flush=True)


def _say(line: str) -> None:
    print(f"tandem: {time.monotonic() - _STARTED_AT:6.1f} s  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
