"""The KV plane with somebody hostile on the line: strangers, changed bytes, swapped and repeated
frames. Whatever arrives is right, whatever is wrong is counted, and the next hand-off works."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cluster.keyring import Keyring
from cluster.messages import Offer
from cluster.sockets import plain_address
from kv_transfer.protocol import CODEC, Blocks, ReadBlocks, Release
from tests.integration.kv_transfer.ports import EPOCH, Open, Side, open_side
from tests.middleman import ByteMiddleman, FrameMiddleman, pass_bytes
from tests.waiting import wait_for

__all__ = ["open_side"]

THEIRS, OURS = (3, 9, 4, 20, 5, 17), (1, 2, 30, 31, 32, 33)
RING = Keyring.generate()
NUMBERS = itertools.count()


def ring() -> Keyring:
    return RING


def via(offer: Offer, endpoint: str) -> Offer:
    return replace(offer, endpoints=(endpoint,))


def hand_over(producer: Side, consumer: Side, endpoint: str | None = None) -> str | None:
    """Pull six blocks; return why that failed, None if they are there."""
    name = f"h{next(NUMBERS)}"
    offer = producer.hold(name, *THEIRS)
    before = [consumer.content(block) for block in OURS]
    consumer.pull(via(offer, endpoint or producer.port.endpoint), *OURS)
    wait_for(consumer.has_ended(name))
    failure = consumer.pulls[name].failure
    if failure is None:
        assert consumer.content(*OURS) == producer.content(*THEIRS)
    else:
        # One that fails late has written whole blocks that were right.
        for block, old, new in zip(OURS, before, THEIRS, strict=True):
            assert consumer.content(block) in (old, producer.content(new))
    return failure


def through(endpoint: str, port: int) -> str:
    """Return the address of a middleman, with the key of who is behind him."""
    return f"tcp://127.0.0.1:{port}#{endpoint.partition('#')[2]}"


def port_of(endpoint: str) -> int:
    return int(plain_address(endpoint).rpartition(":")[2])


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
def test_a_handoff_between_members(open_side: Open, transports: tuple[str, ...]) -> None:
    producer = open_side(ring, transports=transports)
    consumer = open_side(ring, transports=transports)
    assert hand_over(producer, consumer) is None
    assert "#" in producer.port.endpoint
    assert not any("peers" in kind for kind in producer.port.totals())


def test_a_stranger_gets_nothing_and_is_counted(open_side: Open) -> None:
    producer, member = open_side(ring), open_side(ring)
    stranger = open_side(Keyring.generate)
    assert "no data for 0.5 s from tcp://127.0.0.1:" in str(hand_over(producer, stranger))
    assert producer.port.totals()["peers_key"] > 0
    outside = open_side()
    offer = producer.hold("plain", *THEIRS)
    outside.pull(via(offer, plain_address(producer.port.endpoint)), *OURS)
    wait_for(outside.has_ended("plain"))
    assert outside.pulls["plain"].failure is not None
    assert producer.port.totals()["peers_protocol"] > 0
    assert hand_over(producer, member) is None


def test_keys_change_while_blocks_are_pulled(open_side: Open) -> None:
    rings = [RING]
    producer = open_side(lambda: rings[0], transports=("tcp",))
    consumer = open_side(lambda: rings[0], transports=("tcp",))
    for change in (Keyring.with_new, Keyring.using_newest, Keyring.without_old):
        for _ in range(5):
            assert hand_over(producer, consumer) is None
        rings[0] = change(rings[0])
    assert hand_over(producer, consumer) is None
    stranger = open_side(ring, transports=("tcp",))
    assert hand_over(producer, stranger) is not None, "the old key is nobody's any more"
    assert hand_over(producer, consumer) is None


def test_a_producer_that_has_not_the_new_key_yet_is_read_from_with_the_old_one(
    open_side: Open,
) -> None:
    added = RING.with_new()
    ours, theirs = [RING], [RING]
    producer = open_side(lambda: theirs[0], transports=("tcp",))
    consumer = open_side(lambda: ours[0], transports=("tcp",))
    assert hand_over(producer, consumer) is None
    ours[0] = added.using_newest()
    for _ in range(3):
        assert hand_over(producer, consumer) is None
    wait_for(lambda: producer.port.totals().get("peers_key"))
    theirs[0] = added
    newest = (producer.port.endpoint, EPOCH, ours[0].used.name)

    def is_renewed() -> bool:
        """A connection that was refused is made anew within seconds, beside the old one."""
        assert hand_over(producer, consumer) is None
        link = consumer.port._links.get(newest)
        return link is not None and link.is_welcome

    wait_for(is_renewed)
    used_s = consumer.port._links[newest].last_used
    assert hand_over(producer, consumer) is None
    assert consumer.port._links[newest].last_used > used_s


# Under CURVE, changed bytes end the connection that they came on.


class Meddler:
    """Changes each piece with some probability, once the handshake is over."""

    def __init__(self, seed: int, change: Callable[[bytes, random.Random], bytes | None]) -> None:
        self._rng = random.Random(seed)
        self._change = change
        self.num_changed = 0

    def __call__(self, data: bytes, _is_answer: bool) -> bytes | None:
        if len(data) < 300 or self._rng.random() < 0.5:
            return data
        self.num_changed += 1
        return self._change(data, self._rng)


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def repeat(data: bytes, _rng: random.Random) -> bytes:
    return data + data


def cut(_data: bytes, _rng: random.Random) -> None:
    return None


@pytest.mark.parametrize("change", [flip, truncate, repeat, cut])
def test_changed_bytes_under_curve_never_arrive(
    open_side: Open, change: Callable[[bytes, random.Random], bytes | None]
) -> None:
    producer = open_side(ring, transports=("tcp",))
    consumer = open_side(ring, transports=("tcp",), stall_timeout_s=0.3)
    meddler = Meddler(5, change)
    with ByteMiddleman(port_of(producer.port.endpoint), meddler) as middleman:
        address = through(producer.port.endpoint, middleman.port)
        failures = [hand_over(producer, consumer, address) for _ in range(4)]
        assert meddler.num_changed > 0 and any(failures)
        middleman.change = pass_bytes
        wait_for(lambda: hand_over(producer, consumer, address) is None, 15.0)
    totals = consumer.port.totals()
    assert totals["pulls_failed"] >= 1 and "chunks_damaged" not in totals


# Without keys, or from a member that is broken, checks of our own stand behind that.


class Swap:
    """Puts the payload of each chunk into the message of the one before."""

    def __init__(self) -> None:
        self._kept: list[bytes] | None = None

    def __call__(self, frames: list[bytes], is_answer: bool) -> Sequence[list[bytes]]:
        if not is_answer or len(frames) != 2:
            return [frames]
        if self._kept is None:
            self._kept = frames
            return []
        (first, one), (second, other) = self._kept, frames
        self._kept = None
        return [[first, other], [second, one]]


class Record:
    """Sends the last read once more when its hand-off has been released."""

    def __init__(self) -> None:
        self._read: list[bytes] = []

    def __call__(self, frames: list[bytes], _is_answer: bool) -> Sequence[list[bytes]]:
        message = CODEC.decode(frames[0])
        if isinstance(message, ReadBlocks):
            self._read = frames
        return [frames, self._read] if isinstance(message, Release) else [frames]


def on_answers(change: Callable[[bytes, bytes], Sequence[list[bytes]]]) -> Callable[..., object]:
    def see(frames: list[bytes], is_answer: bool) -> Sequence[list[bytes]]:
        return change(*frames) if is_answer and len(frames) == 2 else [frames]

    return see


def elsewhere(head: bytes, payload: bytes) -> Sequence[list[bytes]]:
    """Say that the blocks are others of the same hand-off."""
    message = CODEC.decode(head)
    assert isinstance(message, Blocks)
    return [[CODEC.encode(replace(message, first_block=message.first_block + 1)), payload]]


def in_an_old_epoch(frames: list[bytes], is_answer: bool) -> Sequence[list[bytes]]:
    message = CODEC.decode(frames[0])
    if isinstance(message, ReadBlocks | Release):
        frames = [CODEC.encode(replace(message, epoch=message.epoch - 1))]
    return [frames]


@pytest.mark.parametrize(
    ("change", "fails", "counted"),
    [
        (Swap(), "checksum mismatch", "consumer:chunks_damaged"),
        (on_answers(lambda a, b: [[a, b[99:] + b[:99]]]), "checksum", "consumer:chunks_damaged"),
        (on_answers(lambda a, b: [[a, b[:-9]]]), "payload of", "consumer:chunks_damaged"),
        (on_answers(lambda a, _: [[a]]), "payload of 0 bytes", "consumer:chunks_damaged"),
        (on_answers(lambda a, b: [[a, b], [a, b]]), None, "consumer:chunks_foreign"),
        (on_answers(elsewhere), "no data", "consumer:chunks_foreign"),
        (on_answers(lambda a, b: [[a, b, b]]), "no data", "consumer:frames_malformed"),
        (in_an_old_epoch, "stale_epoch", "producer:refused_stale_epoch"),
        (lambda frames, _is_answer: [frames, frames], None, "consumer:chunks_foreign"),
        (Record(), None, "producer:refused_ended"),
    ],
    ids=[
        "chunks swapped",
        "blocks swapped",
        "truncated",
        "payload missing",
        "chunks repeated",
        "wrong place",
        "a frame too many",
        "stale epoch",
        "everything twice",
        "a read again when all is over",
    ],
)
def test_frames_that_were_changed_are_refused_and_counted(
    open_side: Open, change: Callable[..., Sequence[list[bytes]]], fails: str | None, counted: str
) -> None:
    producer, consumer = open_side(transports=("tcp",)), open_side(transports=("tcp",))
    with FrameMiddleman(producer.port.endpoint, change) as middleman:
        failure = hand_over(producer, consumer, middleman.endpoint)
        assert fails in failure if fails and failure else failure == fails
        side, _, kind = counted.partition(":")
        totals = {"producer": producer, "consumer": consumer}[side].port.totals
        wait_for(lambda: totals().get(kind, 0) > 0)
        middleman.change = lambda frames, is_answer: [frames]
        assert hand_over(producer, consumer, middleman.endpoint) is None
