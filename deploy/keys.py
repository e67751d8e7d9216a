"""`tandem keys`: makes and drops API keys and CURVE keys, in files that processes read again.

An API key is printed once and kept nowhere, its hash stands in the file. Either kind is replaced
without a restart: add the new one, move everybody over, drop the old one.
"""

import argparse
import secrets
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import ClusterSection
from cluster.errors import ConfigError
from cluster.keyring import Keyring, parse_keyring
from cluster.watched_file import read_parsed
from deploy.private_file import write_private
from router.api_keys import (
    MAX_KEY_CHARS,
    ApiKey,
    ApiKeys,
    KeyRole,
    digest_of,
    faults_of,
    parse_api_keys,
)

_KEY_BYTES = 32
_STEPS: dict[str, Callable[[Keyring], Keyring]] = {
    "add": Keyring.with_new,
    "use": Keyring.using_newest,
    "drop": Keyring.without_old,
}
_HEADER = "# API keys of a Tandem endpoint, by their SHA-256; `tandem keys` edits this file.\n"
# Shorter ones can be guessed.
_MIN_KEY_CHARS = 20


def add_command(commands: Any) -> None:
    """Add the command to the parsers of `tandem`."""
    about = "make keys: for clients of the endpoint, and for the sockets between processes"
    command = commands.add_parser(
        "keys", help=about, description=about, usage="tandem keys ACTION ...", allow_abbrev=False
    )
    actions = command.add_subparsers(required=True, metavar="ACTION", prog="tandem keys")
    _add_api(actions)
    _add_drop(actions)
    _add_list(actions)
    about = "make a file of CURVE keys, for `security.curve_keys` on every node"
    _add_file(_add_action(actions, "curve", about, run_curve))
    _add_rotate(actions)


def _add_action(actions: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=about, description=about, allow_abbrev=False
    )
    parser.set_defaults(run=run, parser=parser, config=None)
    return parser


def _add_api(actions: Any) -> None:
    about = "make an API key, print it once, and add its hash to a file"
    parser = _add_action(actions, "api", about, run_api)
    _add_file(parser)
    parser.add_argument("key_name", metavar="NAME", help="whose key it is")
    parser.add_argument("--admin", action="store_true", help="it opens the operator's routes too")
    parser.add_argument("--requests-per-minute", type=float, metavar="N", help="default: no limit")
    parser.add_argument(
        "--burst", type=float, metavar="N", help="at once (default: ten seconds' worth)"
    )
    parser.add_argument(
        "--stdin", action="store_true", help="take a key that exists from standard input"
    )


def _add_drop(actions: Any) -> None:
    parser = _add_action(actions, "drop", "take an API key out of a file", run_drop)
    _add_file(parser)
    parser.add_argument("key_name", metavar="NAME")


def _add_list(actions: Any) -> None:
    _add_file(_add_action(actions, "list", "show whose API keys are in a file", run_list))


def _add_rotate(actions: Any) -> None:
    about = "replace CURVE keys: of a deployment that made its own, or in a file step by step"
    parser = _add_action(actions, "rotate", about, run_rotate)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--name", help="a deployment")
    where.add_argument("--file", type=Path, metavar="FILE")
    parser.add_argument(
        "--address", help="with --name: its Ray cluster, if it was not started here"
    )
    parser.add_argument(
        "--step",
        choices=tuple(_STEPS),
        help="with --file: add a key, use it, drop the others; each on every node before the next",
    )


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, required=True, metavar="FILE")


def run_api(_config: object, parsed: argparse.Namespace) -> int:
    key = _given_key() if parsed.stdin else f"tandem-{secrets.token_urlsafe(_KEY_BYTES)}"
    entry: dict[str, Any] = {
        "name": parsed.key_name,
        "sha256": digest_of(key),
        "role": (KeyRole.ADMIN if parsed.admin else KeyRole.CLIENT).value,
        "requests_per_minute": parsed.requests_per_minute,
        "burst": parsed.burst,
    }
    entry = {name: value for name, value in entry.items() if value is not None}
    try:
        ApiKey.model_validate(entry)
    except ValidationError as error:
        raise ConfigError(faults_of(error)) from None
    _write(parsed.file, [*_entries(parsed.file), entry])
    if not parsed.stdin:
        print(key)
    print(f"tandem: {parsed.file} has the key of {parsed.key_name!r}", file=sys.stderr)
    return 0


def run_drop(_config: object, parsed: argparse.Namespace) -> int:
    entries = _entries(parsed.file)
    kept = [entry for entry in entries if entry["name"] != parsed.key_name]
    if len(kept) == len(entries):
        raise ConfigError(f"{parsed.file} has no key of {parsed.key_name!r}")
    if not kept:
        raise ConfigError(f"{parsed.key_name!r} has the last key: add another one first")
    _write(parsed.file, kept)
    print(f"tandem: {parsed.file} has no key of {parsed.key_name!r} any more", file=sys.stderr)
    return 0


def run_list(_config: object, parsed: argparse.Namespace) -> int:
    for key in _read(parsed.file).keys:
        limit = key.requests_per_minute
        rate = "no limit" if limit is None else f"{limit:g} requests per minute"
        print(f"{key.name}  {key.role}  {rate}")
    return 0


def run_curve(_config: object, parsed: argparse.Namespace) -> int:
    ring = Keyring.generate()
    write_private(parsed.file, ring.as_text(), is_new=True)
    print(f"tandem: {parsed.file} has the CURVE key {ring.used.name}", file=sys.stderr)
    return 0


def run_rotate(_config: object, parsed: argparse.Namespace) -> int:
    if parsed.file is None:
        if parsed.step is not None:
            raise ConfigError("--step goes with --file: a deployment takes the steps by itself")
        return _rotate_running(ClusterSection(name=parsed.name, address=parsed.address))
    if parsed.step is None:
        raise ConfigError(f"--file takes a --step: {', '.join(_STEPS)}")
    ring = _STEPS[parsed.step](read_parsed(parsed.file, parse_keyring))
    write_private(parsed.file, ring.as_text())
    first, *others = ring.names
    also = f", and accepts {' '.join(others)} too" if others else ""
    print(f"tandem: {parsed.file} uses the CURVE key {first}{also}", file=sys.stderr)
    return 0


def _rotate_running(cluster: ClusterSection) -> int:
    from deploy.controller_link import controller_of

    with redirect_stdout(sys.stderr), controller_of(cluster) as controller:
        controller.rotate_keys()
    print(f"tandem: {cluster.name!r} takes on new CURVE keys", file=sys.stderr)
    return 0


def _given_key() -> str:
    key = sys.stdin.readline().strip()
    if not (_MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise ConfigError(
            f"a key has {_MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable characters, and no line break"
        )
    return key


def _read(path: Path) -> ApiKeys:
    return read_parsed(path, parse_api_keys)


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [key.model_dump(mode="json", exclude_unset=True) for key in _read(path).keys]


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    content = _HEADER + yaml.safe_dump({"keys": entries}, sort_keys=False)
    try:
        parse_api_keys(content.encode())
    except ConfigError as error:
        raise ConfigError(f"{path} is not written: {error}") from None
    write_private(path, content)
