"""The `tandem` command: serve, demo, status, down."""

import argparse
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from cluster.config import TandemConfig
from cluster.errors import ConfigError, TandemError
from deploy import down as cleaning
from deploy import signals
from deploy.flags import OneLineParser, add_config_flags, config_from
from deploy.session import open_session
from deploy.state import DeploymentState

_STARTED_AT = time.monotonic()


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
        ("down", run_down, "stop a deployment and clean up whatever it left"),
    ):
        usage = f"tandem {name} [flags]"
        command = commands.add_parser(
            name, help=about, description=about, usage=usage, allow_abbrev=False
        )
        command.set_defaults(run=run, parser=command)
        _add_own_flags(name, command)
        add_config_flags(command)
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
    if name == "status":
        command.add_argument("--json", action="store_true", help="print JSON")
    if name == "down":
        command.add_argument("--all", action="store_true", help="every deployment found here")


def run_serve(config: TandemConfig, parsed: argparse.Namespace) -> int:
    return _with_deployment(config, parsed, _stay_up)


def run_demo(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.demo import DemoPlan, run

    plan = DemoPlan(parsed.requests, parsed.rate_scale)
    return _with_deployment(config, parsed, lambda deployment: run(config, deployment.url, plan))


def run_status(config: TandemConfig, parsed: argparse.Namespace) -> int:
    from deploy.status import read_status, show

    state = DeploymentState.read(config.cluster.name)
    if state is None:
        raise TandemError(f"no deployment named {config.cluster.name!r} runs here")
    status = read_status(state)
    print(json.dumps(status, indent=2) if parsed.json else show(status, state.url))
    return 0 if status["healthy"] else 1


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


def _say(line: str) -> None:
    print(f"tandem: {time.monotonic() - _STARTED_AT:6.1f} s  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
