"""Frames made from valid ones by what goes wrong on purpose: bits, cuts, lies about lengths."""

from collections.abc import Iterator, Sequence
from random import Random

# Headers of msgpack that promise the most: arrays, maps, strings, bytes, extensions, integers.
_PROMISES = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + b"\x00" * 7,
    b"\xcb\x7f\xf8" + b"\x00" * 6,
    b"\xc1",
    b"\x93" * 40,
    b"\x81" * 40,
)


def mutated(seeds: Sequence[bytes], rng: Random) -> Iterator[bytes]:
    """Yield changed frames without end; about one in ten is a seed as it was."""
    while True:
        frame = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 8))):
            _change(frame, seeds, rng)
        yield bytes(frame)


def _change(frame: bytearray, seeds: Sequence[bytes], rng: Random) -> None:
    at = rng.randrange(len(frame) + 1)
    kind = rng.randrange(7)
    if kind == 0 and frame:
        frame[at % len(frame)] ^= 1 << rng.randrange(8)
    elif kind == 1 and frame:
        frame[at % len(frame)] = rng.randrange(256)
    elif kind == 2:
        del frame[at:]
    elif kind == 3:
        promise = rng.choice(_PROMISES)
        frame[at : at + rng.choice((0, 1, len(promise)))] = promise
    elif kind == 4:
        other = rng.choice(seeds)
        frame[at:] = other[rng.randrange(len(other)) :]
    elif kind == 5:
        frame[at:at] = rng.randbytes(rng.randrange(1, 9))
    else:
        piece = frame[at : at + rng.randrange(1, 20)]
        frame[at:at] = piece
