"""The CURVE keys by which the processes of a deployment know each other.

A ring has one pair, or several while it is being changed. Whoever has a ring's secrets is a member:
its sockets take peers that use any pair of the ring, and use the first pair towards others. A
listening socket has a pair of its own besides, made when it is opened; its public half is part
of its address, which only members are told.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml
import zmq
from zmq.utils import z85

from cluster.errors import ConfigError

_KEY_BYTES = 32
_MAX_PAIRS = 8
_HEADER = (
    "# CURVE keys of a Tandem deployment: whoever has them can act as its router or worker.\n"
    "# The first one is used, all are accepted; `tandem keys rotate` changes them.\n"
)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One pair, both halves in ZeroMQ's text form (Z85)."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "KeyPair":
        return cls(*zmq.curve_keypair())

    @classmethod
    def of_secret(cls, text: str) -> "KeyPair":
        """Return the pair of a secret in hexadecimal; raise `ValueError`."""
        secret = bytes.fromhex(text)
        if len(secret) != _KEY_BYTES:
            raise ValueError(f"a secret has {_KEY_BYTES} bytes")
        encoded = z85.encode(secret)
        return cls(zmq.curve_public(encoded), encoded)

    @property
    def name(self) -> str:
        """Return what may be shown: the beginning of the public half."""
        return public_text(self.public)[:12]


@functools.lru_cache(maxsize=256)
def public_text(public: bytes) -> str:
    """Return a public key as it is written into addresses: Z85 has characters that those do not."""
    return z85.decode(public).hex()


def public_of_text(text: str) -> bytes:
    """Return the public key in an address; raise `ValueError`."""
    key = bytes.fromhex(text)
    if len(key) != _KEY_BYTES:
        raise ValueError(f"a public key has {_KEY_BYTES} bytes")
    encoded: bytes = z85.encode(key)
    return encoded


@dataclass(frozen=True, slots=True)
class Keyring:
    """The pairs in force; the first is used, all are accepted."""

    pairs: tuple[KeyPair, ...]

    @classmethod
    def generate(cls) -> "Keyring":
        return cls((KeyPair.generate(),))

    def __iter__(self) -> Iterator[KeyPair]:
        return iter(self.pairs)

    @property
    def used(self) -> KeyPair:
        return self.pairs[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Return what may be shown of it: the name of the pair in use, then the others'."""
        return tuple(pair.name for pair in self.pairs)

    def accepts(self, public: bytes) -> bool:
        """Return whether a peer with this key (32 raw bytes) is a member."""
        return any(z85.decode(pair.public) == public for pair in self.pairs)

    # A change without a moment in which members refuse each other: each step must have reached
    # all of them before the next.

    def with_new(self) -> "Keyring":
        """Step 1: accept one more pair, and go on using the old one."""
        if len(self.pairs) == _MAX_PAIRS:
            raise ConfigError(f"there are {_MAX_PAIRS} pairs already: drop old ones first")
        return Keyring((*self.pairs, KeyPair.generate()))

    def using_newest(self) -> "Keyring":
        """Step 2: use the newest pair, and go on accepting the others."""
        return Keyring((self.pairs[-1], *self.pairs[:-1]))

    def without_old(self) -> "Keyring":
        """Step 3: accept the pair in use only."""
        return Keyring(self.pairs[:1])

    def as_text(self) -> str:
        """Return the content of a file with the ring: secret."""
        secrets = (f'  - "{z85.decode(pair.secret).hex()}"\n' for pair in self.pairs)
        return f"{_HEADER}secrets:\n{''.join(secrets)}"


def parse_keyring(content: bytes) -> Keyring:
    """Return the ring in a file's content; raise `ConfigError`, which quotes none of it."""
    try:
        document = yaml.safe_load(content)
        secrets = document["secrets"]
        if set(document) != {"secrets"} or not isinstance(secrets, list):
            raise ValueError
        pairs = tuple(KeyPair.of_secret(str(secret)) for secret in secrets)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError, zmq.ZMQError):
        raise ConfigError("not a file of CURVE keys as `tandem keys curve` makes them") from None
    if not 0 < len(pairs) <= _MAX_PAIRS or len(set(pairs)) < len(pairs):
        raise ConfigError(f"1 to {_MAX_PAIRS} different keys are wanted")
    return Keyring(pairs)
