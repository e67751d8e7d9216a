"""CURVE rings: their steps of change, their file, and that neither shows a secret."""

import itertools

import pytest
import zmq
from zmq.utils import z85

from cluster.errors import ConfigError
from cluster.keyring import KeyPair, Keyring, parse_keyring, public_of_text, public_text


def test_a_ring_survives_its_file_and_shows_no_secret() -> None:
    ring = Keyring.generate().with_new()
    text = ring.as_text()
    assert parse_keyring(text.encode()) == ring
    for pair in ring:
        secret = z85.decode(pair.secret).hex()
        assert secret in text
        assert secret not in repr(ring) and pair.secret.decode() not in repr(ring)
        assert zmq.curve_public(pair.secret) == pair.public
        assert public_of_text(public_text(pair.public)) == pair.public


def test_in_no_step_of_a_change_do_two_members_refuse_each_other() -> None:
    before = Keyring.generate()
    steps = [before, before.with_new()]
    steps.append(steps[-1].using_newest())
    steps.append(steps[-1].without_old())
    assert steps[0].used == steps[1].used != steps[2].used == steps[3].used
    for earlier, later in itertools.pairwise(steps):
        assert earlier.accepts(z85.decode(later.used.public))
        assert later.accepts(z85.decode(earlier.used.public))
    assert not steps[3].accepts(z85.decode(before.used.public))
    assert not before.accepts(z85.decode(KeyPair.generate().public))
    assert not before.accepts(b"") and not before.accepts(b"x" * 32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"secrets: []",
        b"secrets: {a: b}",
        b'secrets: ["zz"]',
        b'secrets: ["' + b"0" * 62 + b'"]',
        b'secrets: ["' + b"1" * 64 + b'"]\nmore: 1',
        b'secrets: ["' + b"1" * 64 + b'", "' + b"1" * 64 + b'"]',
        b"secrets: [" + b", ".join(b'"%064d"' % n for n in range(1, 10)) + b"]",
        b"[" * 500,
    ],
)
def test_a_file_that_is_no_ring_is_refused_without_a_quotation(content: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keyring(content)
    assert "111" not in str(caught.value)


def test_a_ring_does_not_grow_without_end() -> None:
    ring = Keyring.generate()
    with pytest.raises(ConfigError, match="drop old ones first"):
        for _ in range(20):
            ring = ring.with_new()
