"""The codec: every message survives the trip, and no bytes do anything but raise `WireError`."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster import messages
from cluster.messages import CODEC, PROTOCOL_VERSION, Heartbeat, Rejected, Tokens
from cluster.names import FinishReason, RequestId, RouterId
from cluster.wire import MAX_FRAME_BYTES, Codec, WireError

KINDS: list[type] = [
    messages.Heartbeat,
    messages.Prefill,
    messages.Decode,
    messages.Cancel,
    messages.Rejected,
    messages.Offered,
    messages.Prefilled,
    messages.Tokens,
    messages.Failed,
    messages.WorkerSnapshot,
    messages.ChangeRole,
    messages.Tally,
]
# A small alphabet of every encoded length: hypothesis takes seconds to list all of Unicode.
ALPHABET = "a0 \x00\u00e4\u6c34\U0001f701"
INTS = st.integers(-(2**63), 2**64 - 1)
FLOATS = st.floats(allow_nan=False)
DOCUMENTS = st.dictionaries(
    st.text(ALPHABET, max_size=8),
    st.recursive(
        st.none() | st.booleans() | INTS | FLOATS | st.text(ALPHABET) | st.binary(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(ALPHABET), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for whatever a message field may be declared as."""
    annotation = getattr(annotation, "__supertype__", annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(part) for part in arguments])
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=5).map(tuple)
    if origin is Mapping:
        return DOCUMENTS
    if dataclasses.is_dataclass(annotation):
        return message_of(typing.cast(type, annotation))
    if annotation is type(None):
        return st.none()
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: INTS,
        float: FLOATS,
        str: st.text(ALPHABET, max_size=12),
        bytes: st.binary(max_size=12),
        bool: st.booleans(),
    }
    return plain[annotation] if annotation in plain else st.sampled_from(annotation)


def message_of(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    return st.builds(kind, **{name: values_of(hints[name]) for name in fields})


MESSAGES = st.one_of([message_of(kind) for kind in KINDS])


def decode_or_refuse(frame: bytes) -> Any:
    """Return the message or None; any error but `WireError` fails the test."""
    try:
        message = CODEC.decode(frame)
    except WireError:
        return None
    assert type(message) in KINDS
    # A valid message is one that can be sent on. Bytes are compared, as NaN equals nothing.
    again = CODEC.encode(message)
    assert CODEC.encode(CODEC.decode(again)) == again
    return message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type) -> None:
    @settings(max_examples=15, deadline=None)
    @given(message_of(kind))
    def check(message: Any) -> None:
        assert CODEC.decode(CODEC.encode(message)) == message

    check()


def test_every_kind_of_the_plane_is_tried() -> None:
    assert set(KINDS) == set(CODEC._tags)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=64))
@example(b"")
@example(b"\x93")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\x91" * 5000)
def test_arbitrary_bytes_are_refused_or_valid(frame: bytes) -> None:
    decode_or_refuse(frame)


@settings(max_examples=50, deadline=None)
@given(MESSAGES, st.data())
def test_mutated_frames_are_refused_or_valid(message: Any, data: st.DataObject) -> None:
    frame = bytearray(CODEC.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                frame[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del frame[max(place, 1) :]
            case _:
                frame[place:place] = data.draw(st.binary(min_size=1, max_size=4))
    decode_or_refuse(bytes(frame))


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | INTS | FLOATS | st.text(ALPHABET) | st.binary(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=12) | st.dictionaries(st.text(ALPHABET), inner, max_size=3)
        ),
        max_leaves=20,
    ),
    st.integers(0, 10),
)
def test_any_fields_under_a_valid_head_are_refused_or_valid(fields: Any, tag: int) -> None:
    decode_or_refuse(msgpack.packb([PROTOCOL_VERSION, tag, fields]))


def head(*parts: Any) -> bytes:
    return typing.cast(bytes, msgpack.packb(list(parts)))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (head(PROTOCOL_VERSION + 1, 1, ["r", 0]), "version"),
        (head(True, 1, ["r", 0]), "version"),
        (head(PROTOCOL_VERSION, 99, []), "tag"),
        (head(PROTOCOL_VERSION, "1", []), "tag"),
        (head(PROTOCOL_VERSION, True, ["r", 0]), "tag"),
        (head(PROTOCOL_VERSION, 1), r"\[version, tag, fields\]"),
        (head(PROTOCOL_VERSION, 1, []), "Heartbeat wants an array of 2"),
        (head(PROTOCOL_VERSION, 1, ["r", 0, "more"]), "Heartbeat wants an array of 2"),
        (head(PROTOCOL_VERSION, 1, [7, 0]), "expected str, got int"),
        (head(PROTOCOL_VERSION, 4, [b"r"]), "expected str, got bytes"),
        (head(PROTOCOL_VERSION, 2, ["r", "h", [1, "2"], None, 0, None]), "array of int"),
        (head(PROTOCOL_VERSION, 2, ["r", "h", [1, True], None, 0, None]), "array of int"),
        (head(PROTOCOL_VERSION, 7, ["r", [1], "bored", *[None] * 5, 0]), "FinishReason"),
        (head(PROTOCOL_VERSION, 3, ["r", [1], {1: 2}, *[None] * 4, False]), "not msgpack|keys"),
        (head(PROTOCOL_VERSION, 1, [msgpack.ExtType(5, b"x"), 0]), "expected str"),
        (
            head(PROTOCOL_VERSION, 3, ["r", [1], {"a": msgpack.Timestamp(1)}, *[None] * 4, False]),
            "not allowed",
        ),
        (head(PROTOCOL_VERSION, 1, ["r", 0]) + b"\x00", "not msgpack"),
    ],
)
def test_refusals_say_what_is_wrong(frame: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        CODEC.decode(frame)


def test_a_deeply_nested_document_is_refused() -> None:
    document: dict[str, Any] = {}
    for _ in range(40):
        document = {"a": document}
    with pytest.raises(WireError, match="nested"):
        CODEC.decode(head(PROTOCOL_VERSION, 3, ["r", [1], document, *[None] * 4, False]))


def test_a_frame_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(WireError, match="over"):
        CODEC.decode(memoryview(bytes(MAX_FRAME_BYTES + 1)))


def test_an_array_that_claims_to_be_huge_allocates_nothing() -> None:
    with pytest.raises(WireError):
        CODEC.decode(b"\x93\x01\x02\xdd\xff\xff\xff\xff")


def test_absent_and_empty_are_told_apart() -> None:
    tokens = Tokens(RequestId("r"), (), FinishReason.STOP, stop_reason=0, logprobs={})
    decoded = CODEC.decode(CODEC.encode(tokens))
    assert decoded == tokens and decoded.stop_reason == 0 and decoded.prompt_logprobs is None


def test_an_annotation_the_wire_cannot_carry_is_refused_when_the_codec_is_made() -> None:
    @dataclasses.dataclass(frozen=True)
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="cannot carry"):
        Codec(1, {1: Odd})


def test_codecs_of_two_versions_do_not_understand_each_other() -> None:
    older = Codec(PROTOCOL_VERSION - 1, {1: Heartbeat, 5: Rejected})
    with pytest.raises(WireError, match="version"):
        CODEC.decode(older.encode(Heartbeat(RouterId("r"), 0)))
