"""The KV plane's frames: every message survives the wire, nothing else gets through."""

import random
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Offer
from cluster.names import HandoffId, WorkerId
from cluster.wire import WireError
from kv_transfer.protocol import (
    CODEC,
    PROTOCOL_VERSION,
    Blocks,
    Filling,
    Greet,
    Place,
    ReadBlocks,
    Refusal,
    Refused,
    Release,
    Renew,
    Via,
    Welcome,
    awaits_token,
    consume_params,
    handoff_to_produce,
    offer_to_consume,
    offered,
    offered_params,
    produce_params,
)

KINDS = (Greet, Welcome, ReadBlocks, Blocks, Filling, Refused, Renew, Release)
IDS = st.text(max_size=40).map(HandoffId)
INTS = st.integers(-(2**63), 2**64 - 1)
WAYS = st.sampled_from(Via)
VIAS = st.lists(WAYS, max_size=3).map(tuple)
PARCELS = st.lists(INTS, max_size=3).map(tuple)
PLACES = st.lists(st.builds(Place, WAYS, st.text(max_size=40)), max_size=3).map(tuple)
MESSAGES = st.one_of(
    st.builds(Greet, INTS, VIAS),
    st.builds(Welcome, INTS, PLACES),
    st.builds(ReadBlocks, IDS, INTS, st.text(max_size=40), INTS, INTS, INTS, PLACES, PARCELS),
    st.builds(
        Blocks,
        IDS,
        *[INTS] * 4,
        st.none() | INTS,
        INTS,
        WAYS,
        INTS,
        st.none() | st.floats(allow_nan=False),
        st.none() | INTS,
    ),
    st.builds(Filling, IDS),
    st.builds(Refused, IDS, st.sampled_from(Refusal), st.text(max_size=80)),
    st.builds(Renew, IDS, INTS, PARCELS),
    st.builds(Release, IDS, INTS, st.booleans()),
)
OFFERS = st.builds(
    Offer,
    IDS,
    st.text(max_size=20).map(WorkerId),
    INTS,
    st.text(max_size=32),
    st.lists(st.text(max_size=40), max_size=4).map(tuple),
    INTS,
    INTS,
    st.floats(allow_nan=False),
)


def decode_or_refuse(frame: bytes) -> object:
    """Return what the frame says or None; anything but a message or `WireError` escapes."""
    try:
        message = CODEC.decode(frame)
    except WireError:
        return None
    assert isinstance(message, KINDS)
    # Bytes are compared, as NaN equals nothing.
    again = CODEC.encode(message)
    assert CODEC.encode(CODEC.decode(again)) == again
    return message


@given(MESSAGES)
def test_messages_survive_the_wire(message: object) -> None:
    assert CODEC.decode(CODEC.encode(message)) == message
    assert CODEC.decode(memoryview(CODEC.encode(message))) == message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_refused(frame: bytes) -> None:
    decode_or_refuse(frame)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | INTS
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=12,
    ),
    st.integers(0, 9),
)
def test_arbitrary_msgpack_is_a_message_or_refused(fields: Any, tag: int) -> None:
    decode_or_refuse(msgpack.packb([PROTOCOL_VERSION, tag, fields]))


@given(MESSAGES, st.randoms(use_true_random=False))
def test_mutated_frames_are_a_message_or_refused(message: object, rng: random.Random) -> None:
    frame = bytearray(CODEC.encode(message))
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(frame))
        kind = rng.randrange(3)
        if kind == 0:
            frame[index] ^= 1 << rng.randrange(8)
        elif kind == 1:
            frame.insert(index, rng.randrange(256))
        elif len(frame) > 1:
            del frame[index]
    decode_or_refuse(bytes(frame))


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("another version", [PROTOCOL_VERSION + 1, 4, ["h", 1]]),
        ("a version that equals but is no integer", [True, 4, ["h", 1]]),
        ("an unknown tag", [PROTOCOL_VERSION, 99, ["h", 1]]),
        ("a field too few", [PROTOCOL_VERSION, 4, ["h"]]),
        ("a field too many", [PROTOCOL_VERSION, 4, ["h", 1, 2]]),
        ("a wrong type", [PROTOCOL_VERSION, 4, ["h", "1"]]),
        ("a boolean for an integer", [PROTOCOL_VERSION, 4, ["h", True]]),
        ("an unknown refusal", [PROTOCOL_VERSION, 3, ["h", "because", "x"]]),
        ("nothing", []),
    ],
)
def test_what_is_refused(label: str, parts: list[object]) -> None:
    with pytest.raises(WireError):
        CODEC.decode(msgpack.packb(parts))


@given(IDS)
def test_produce_params_come_back(handoff_id: HandoffId) -> None:
    params = produce_params(handoff_id)
    assert handoff_to_produce(params) == handoff_id
    assert offer_to_consume(params) is None


@given(OFFERS, st.booleans())
def test_consume_params_come_back(offer: Offer, is_awaiting: bool) -> None:
    params = consume_params(offer, is_awaiting)
    # vLLM sends them to its engine process as msgpack, where tuples become lists.
    for arrived in (params, msgpack.unpackb(msgpack.packb(params))):
        assert offer_to_consume(arrived) == offer
        assert awaits_token(arrived) == is_awaiting
        assert handoff_to_produce(arrived) is None


@given(OFFERS)
def test_offered_params_come_back(offer: Offer) -> None:
    params = offered_params(offer)
    for arrived in (params, msgpack.unpackb(msgpack.packb(params))):
        assert offered(arrived) == offer
        assert offer_to_consume(arrived) is None
        assert handoff_to_produce(arrived) is None


@pytest.mark.parametrize("params", [None, {}, {"receipt": None}])
def test_requests_without_a_handoff(params: dict[str, Any] | None) -> None:
    assert handoff_to_produce(params) is None
    assert offer_to_consume(params) is None
    assert not awaits_token(params)
    assert offered(params) is None
