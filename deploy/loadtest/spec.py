"""The text that names a workload: `KIND[:key=value,...]`, phases joined by `;`.

Every kind is a frozen dataclass whose fields are its keys; a field says with `key` how its text is
read and what it means. Nothing else needs to know the keys.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cluster.errors import ConfigError

Phase = TypeVar("Phase")


def key(read: Callable[[str], Any], default: Any, says: str) -> Any:
    """Return a dataclass field whose text `read` turns into its value, or raises ValueError.

    The ValueError's message is what the text should have been.
    """
    return dataclasses.field(default=default, metadata={"read": read, "says": says})


def parse(text: str, kinds: Mapping[str, type[Phase]]) -> list[Phase]:
    """Return the phases that `text` asks for; raise `ConfigError` with what is wrong in it."""
    phases = [each.strip() for each in text.split(";")]
    if not all(phases):
        raise ConfigError(f"workload {text!r}: a phase is empty; write KIND[:key=value,...]")
    return [_parse_phase(phase, kinds) for phase in phases]


def _parse_phase(text: str, kinds: Mapping[str, type[Phase]]) -> Phase:
    name, _, arguments = text.partition(":")
    if name not in kinds:
        raise ConfigError(
            f"workload {text!r}: no kind {name!r}{_nearest(name, kinds)}; "
            f"there are {', '.join(kinds)}"
        )
    kind = kinds[name]
    readers = {f.name: f.metadata["read"] for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for argument in filter(None, arguments.split(",")):
        key_name, equals, value = argument.partition("=")
        place = f"workload {text!r}: "
        if key_name not in readers:
            raise ConfigError(
                f"{place}no key {key_name!r}{_nearest(key_name, readers)}; "
                f"{name} takes {', '.join(readers)}"
            )
        if not equals or key_name in values:
            raise ConfigError(f"{place}{key_name} needs one value: {key_name}=...")
        try:
            values[key_name] = readers[key_name](value)
        except ValueError as error:
            raise ConfigError(f"{place}{key_name}={value} is not {error}") from None
    return kind(**values)


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def describe(kinds: Mapping[str, type[Any]]) -> Iterator[str]:
    """Yield the lines that explain every kind and its keys."""
    for name, kind in kinds.items():
        yield f"{name}: {(kind.__doc__ or '').splitlines()[0]}"
        for field in dataclasses.fields(kind):
            default = "" if field.default in (None, "") else f" ({_written(field.default)})"
            yield f"    {field.name}={default}  {field.metadata['says']}"


def _written(default: object) -> str:
    return getattr(default, "text", None) or str(default)


def above_zero(text: str) -> float:
    """Read a number above 0."""
    return _number(text, lambda number: number > 0, "a number above 0")


def not_negative(text: str) -> float:
    """Read a number of at least 0."""
    return _number(text, lambda number: number >= 0, "a number of at least 0")


def _number(text: str, is_right: Callable[[float], bool], should_be: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(should_be) from None
    if not math.isfinite(number) or not is_right(number):
        raise ValueError(should_be)
    return number


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1")
    return int(text)


def count_or_none(text: str) -> int:
    """Read a whole number of at least 0."""
    if not text.isdecimal():
        raise ValueError("a whole number of at least 0")
    return int(text)


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of the words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text

    return read
