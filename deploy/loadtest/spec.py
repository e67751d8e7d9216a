"""The text that names a workload: `KIND[:key=value,...]`, phases joined by `;`.

Every kind is a frozen dataclass whose fields are its keys, `Annotated` with the `Key` that says how
the text is read and what it means. Nothing else needs to know the keys.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from cluster.errors import ConfigError

Phase = TypeVar("Phase")


@dataclass(frozen=True, slots=True)
class Key:
    """How a key's text is read, and what it means.

    `read` raises a ValueError whose message is what the text should have been.
    """

    read: Callable[[str], Any]
    says: str


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
    readers = keys_of(kind)
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
            values[key_name] = readers[key_name].read(value)
        except ValueError as error:
            raise ConfigError(f"{place}{key_name}={value} is not {error}") from None
    return kind(**values)


def keys_of(kind: type[Any]) -> dict[str, Key]:
    """Return a kind's keys, in the order of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(kind)}


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def describe(kinds: Mapping[str, type[Any]], common: type[Any]) -> Iterator[str]:
    """Yield the lines that explain every kind's keys; those of `common`, which all have, once."""
    yield "every workload"
    yield from _described(common, ())
    for name, kind in kinds.items():
        yield f"{name}: {(kind.__doc__ or '').splitlines()[0]}"
        yield from _described(kind, keys_of(common))


def _described(kind: type[Any], known: Container[str]) -> Iterator[str]:
    for name, key in keys_of(kind).items():
        if name not in known:
            default = getattr(kind(), name)
            yield f"  {name:<10} {key.says}" + ("" if default in (None, "") else f" [{default}]")


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
