"""Settings written into a YAML file that people edit: comments and order stay as they are."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config import merge, parse_config
from cluster.errors import ConfigError


def read_document(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a configuration file's text and document, both empty if there is no such file."""
    try:
        text = path.read_text() if path.exists() else ""
        document = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a mapping of sections")
    return text, document


def write_settings(path: Path, section: str, settings: Mapping[str, Any]) -> None:
    """Set `settings` in one section of the file, made if it is not there.

    Raise `ConfigError`, with the file untouched, if the result would be no valid configuration.
    """
    text, document = read_document(path)
    wanted = merge(document, {section: settings})
    try:
        parse_config(wanted)
    except ConfigError as error:
        raise ConfigError(f"{path} is not written: {error}") from None
    edited = with_settings(text, section, settings)
    if _load(edited) != wanted:
        # Written in a way that lines do not show, as {a: 1}: then comments cannot be kept.
        edited = yaml.safe_dump(wanted, sort_keys=False)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(edited)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def with_settings(text: str, section: str, settings: Mapping[str, Any]) -> str:
    """Return the YAML text with the settings changed or added line by line."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if _opens(line, section)), None)
    if start is None:
        return "\n".join([*lines, f"{section}:", *_written("  ", settings), ""])
    end = next((i for i in range(start + 1, len(lines)) if _is_outside(lines[i])), len(lines))
    body = lines[start + 1 : end]
    indent = next((_indent(line) for line in body if _has_key(line)), "  ")
    rest = dict(settings)
    for index, line in enumerate(body):
        found = re.match(rf"{indent}([\w-]+):[^#]*?(\s+#.*)?$", line)
        if found and found[1] in rest:
            (written,) = _written(indent, {found[1]: rest.pop(found[1])})
            body[index] = written + (found[2] or "")
    changed = [*lines[: start + 1], *_written(indent, rest), *body, *lines[end:]]
    return "\n".join([*changed, ""])


def _opens(line: str, section: str) -> bool:
    return re.match(rf"{re.escape(section)}:\s*(#.*)?$", line) is not None


def _is_outside(line: str) -> bool:
    return line != "" and not line[0].isspace() and not line.startswith("#")


def _has_key(line: str) -> bool:
    return re.match(r"\s+[\w-]+:", line) is not None


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _written(indent: str, settings: Mapping[str, Any]) -> list[str]:
    if not settings:
        return []
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    return [indent + line for line in text.splitlines()]


def _load(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None
