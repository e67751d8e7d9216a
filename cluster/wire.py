"""Versioned msgpack frames for frozen dataclasses: the one codec of both ZeroMQ planes.

A frame is the msgpack array ``[version, tag, field, ...]``. Decoding is strict: the version
must match, the tag must be known and every field must have the declared type, so a frame
either becomes a valid message or raises `WireError`. Nothing is ever unpickled.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

MAX_FRAME_BYTES = 64 * 1024 * 1024
_MAX_DEPTH = 16

Check = Callable[[Any], Any]


class WireError(ValueError):
    """The peer sent bytes that are not a valid message of this protocol version."""


def _plain(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise WireError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _scalar(kinds: tuple[type, ...]) -> Check:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise WireError(f"unexpected {type(value).__name__}")
        return value

    return check


def _check_float(value: Any) -> float:
    if type(value) not in (float, int):
        raise WireError(f"expected float, got {type(value).__name__}")
    return float(value)


def _enum(kind: type[enum.Enum]) -> Check:
    def check(value: Any) -> Any:
        try:
            return kind(value)
        except ValueError:
            raise WireError(f"{value!r} is not a {kind.__name__}") from None

    return check


def _sequence(item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise WireError(f"expected array, got {type(value).__name__}")
        return tuple(item(entry) for entry in value)

    return check


def _plain_sequence(kind: type) -> Check:
    """Token id arrays are long: one set of their types is 4x faster than a check per item."""

    def check(value: Any) -> Any:
        if type(value) is not list:
            raise WireError(f"expected array, got {type(value).__name__}")
        if value and set(map(type, value)) != {kind}:
            raise WireError(f"expected array of {kind.__name__}")
        return tuple(value)

    return check


def _check_document(value: Any, depth: int = 0) -> Any:
    """Accept what JSON can say, and bytes; refuse extension types and deep nesting."""
    if depth > _MAX_DEPTH:
        raise WireError(f"document nested deeper than {_MAX_DEPTH}")
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise WireError("document keys must be strings")
        return {key: _check_document(entry, depth + 1) for key, entry in value.items()}
    if type(value) is list:
        return [_check_document(entry, depth + 1) for entry in value]
    if value is not None and type(value) not in (bool, int, float, str, bytes):
        raise WireError(f"{type(value).__name__} is not allowed in a document")
    return value


def _check_mapping(value: Any) -> Any:
    if type(value) is not dict:
        raise WireError(f"expected map, got {type(value).__name__}")
    return _check_document(value)


def document_bytes(document: Mapping[str, Any]) -> int:
    """Return the size of a document on the wire; raise `WireError` if no peer would take it."""
    _check_document(document)
    try:
        return len(msgpack.packb(document))
    except (ValueError, OverflowError, TypeError) as error:
        # JSON has strings that are not Unicode, and integers of any size.
        raise WireError(str(error)) from None


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _check_for(annotation: Any) -> Check:
    """Return the validator of one field's annotation; refuse annotations the wire lacks."""
    annotation = getattr(annotation, "__supertype__", annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = [part for part in arguments if part is not type(None)]
        check = _check_for(inner[0]) if len(inner) == 1 else _scalar(tuple(inner))
        return _optional(check) if len(inner) < len(arguments) else check
    if origin is tuple and arguments[1:] == (...,):
        is_int = arguments[0] is int
        return _plain_sequence(int) if is_int else _sequence(_check_for(arguments[0]))
    if origin is Mapping:
        return _check_mapping
    if annotation is float:
        return _check_float
    if annotation in (int, str, bytes, bool):
        return _plain(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _enum(annotation)
    if dataclasses.is_dataclass(annotation):
        return _record(typing.cast(type, annotation))
    raise TypeError(f"the wire cannot carry {annotation!r}")


def _record(kind: type) -> Check:
    hints = typing.get_type_hints(kind)
    checks = [_check_for(hints[field.name]) for field in dataclasses.fields(kind)]

    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(checks):
            raise WireError(f"{kind.__name__} wants an array of {len(checks)} fields")
        return kind(*(item(entry) for item, entry in zip(checks, value, strict=True)))

    return check


def _fields(message: Any) -> list[Any]:
    """Return the fields in declaration order, nested messages as arrays."""
    return [_encodable(getattr(message, field.name)) for field in dataclasses.fields(message)]


def _encodable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], (int, float, str)):
        return [_encodable(entry) for entry in value]
    return value


class Codec:
    """Encodes and decodes the message types of one protocol.

    `kinds` maps a stable numeric tag to a frozen dataclass; tags are never reused.
    """

    def __init__(self, version: int, kinds: Mapping[int, type]) -> None:
        self.version = version
        self._tags = {kind: tag for tag, kind in kinds.items()}
        self._checks = {tag: _record(kind) for tag, kind in kinds.items()}

    def encode(self, message: Any) -> bytes:
        """Return the frame of `message`, one of the codec's kinds."""
        frame = msgpack.packb([self.version, self._tags[type(message)], _fields(message)])
        return typing.cast(bytes, frame)

    def decode(self, frame: bytes | memoryview) -> Any:
        """Return the message in `frame`; raise `WireError` for anything else."""
        if len(frame) > MAX_FRAME_BYTES:
            raise WireError(f"frame of {len(frame)} bytes is over {MAX_FRAME_BYTES}")
        try:
            parts = msgpack.unpackb(frame, strict_map_key=True)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise WireError(f"not msgpack: {error}") from None
        if type(parts) is not list or len(parts) != 3:
            raise WireError("a frame is [version, tag, fields]")
        version, tag, fields = parts
        if version != self.version or type(version) is not int:
            raise WireError(f"peer speaks version {version!r}, this is {self.version}")
        check = self._checks.get(tag) if type(tag) is int else None
        if check is None:
            raise WireError(f"unknown message tag {tag!r}")
        return check(fields)
