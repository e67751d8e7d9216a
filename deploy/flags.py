"""Command-line flags generated from the configuration model: one per setting, and short names."""

import argparse
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config import TandemConfig, load_config, merge, parse_config, section_of
from cluster.section import Section

ALIASES = {
    "cluster.address": ("--address",),
    "cluster.name": ("--name",),
    "decode.workers": ("--decode",),
    "model.path": ("--model",),
    "prefill.workers": ("--prefill",),
    "router.host": ("--host",),
    "router.port": ("--port",),
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of `TandemConfig`, grouped by section."""
    general = parser.add_argument_group("configuration")
    general.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags go over it")
    general.add_argument(
        "--simulated",
        dest="model.engine",
        action="store_const",
        const="simulated",
        help="short for --model.engine simulated",
    )
    for name, section in _sections():
        described = parser.add_argument_group(name, _first_line(section))
        for field_name, field in section.model_fields.items():
            _add_flag(described, f"{name}.{field_name}", field)


def config_from(arguments: argparse.Namespace) -> TandemConfig:
    """Return the configuration of the file, if one is named, with the flags laid over it."""
    given: dict[str, Any] = {}
    for path in config_paths():
        value = getattr(arguments, path, None)
        if value is not None:
            section, _, field = path.partition(".")
            given.setdefault(section, {})[field] = value
    if arguments.config is None:
        return parse_config(given)
    base = load_config(arguments.config)
    return parse_config(merge(base.model_dump(exclude_unset=True), given))


def config_paths() -> list[str]:
    """Return every setting as "section.field"."""
    return [f"{name}.{field}" for name, section in _sections() for field in section.model_fields]


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in TandemConfig.model_fields.items():
        section = section_of(field.annotation)
        assert section is not None
        yield name, section


def _add_flag(group: argparse._ArgumentGroup, path: str, field: FieldInfo) -> None:
    default = field.get_default(call_default_factory=True)
    described = " ".join(filter(None, [field.description, _shown(default)])).replace("%", "%%")
    names = (*ALIASES.get(path, ()), f"--{path}")
    settings: dict[str, Any] = {"dest": path, "default": None, "help": described}
    if field.annotation is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif _is_mapping(field):
        settings |= {"metavar": "YAML", "type": _mapping}
    else:
        settings["metavar"] = _metavar(path, field)
    group.add_argument(*names, **settings)


def _metavar(path: str, field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(field.annotation))) + "}"
    return path.rpartition(".")[2].upper()


def _shown(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return ""
    return f"(default: {default})"


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) in (dict, Mapping)


def _mapping(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping like {{name: value}}")
    return value


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]
