"""API keys: who may use the endpoint, as what, and how often. Pure.

The file has a key's SHA-256, not the key: 256 random bits need no salt and no slow hash, and a
file that leaks opens nothing. `tandem keys api` writes it.
"""

import enum
import hashlib
import hmac
from collections.abc import Iterable
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.errors import ConfigError
from cluster.section import Positive, Section

# Longer ones are refused unread.
MAX_KEY_CHARS = 512


class KeyRole(enum.StrEnum):
    """What a key opens: the models, or the operator's routes too."""

    CLIENT = "client"
    ADMIN = "admin"


class ApiKey(Section):
    """One key; `burst` requests may come at once, by default those of ten seconds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    role: KeyRole = KeyRole.CLIENT
    requests_per_minute: Positive | None = None
    burst: Annotated[float, Field(ge=1)] | None = None

    @property
    def capacity(self) -> float:
        """Return how many requests may come at once, over all routers."""
        rate = self.requests_per_minute or 0.0
        return self.burst or max(1.0, rate / 6)


class _Document(Section):
    keys: tuple[ApiKey, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "_Document":
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        if len({key.sha256 for key in self.keys}) < len(self.keys):
            raise ValueError("one key is there under two names")
        return self


class ApiKeys:
    """The keys in force."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self.keys = tuple(keys)

    def __repr__(self) -> str:
        return f"<ApiKeys {' '.join(key.name for key in self.keys)}>"

    def find(self, presented: str) -> ApiKey | None:
        """Return whose key this is, None if nobody's; takes as long either way."""
        digest = digest_of(presented[: MAX_KEY_CHARS + 1])
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if len(presented) <= MAX_KEY_CHARS else None


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse_api_keys(content: bytes) -> ApiKeys:
    """Return the keys in a file's content; raise `ConfigError`, which quotes none of it."""
    try:
        # The C loader, where there is one: routers read the file again while they serve.
        document = yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError("not YAML") from None
    try:
        return ApiKeys(_Document.model_validate(document).keys)
    except ValidationError as error:
        raise ConfigError(faults_of(error)) from None


def faults_of(error: ValidationError) -> str:
    """Return what is wrong and where, without the values: they may be keys."""
    faults = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in faults)


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the key that a request brings, as OpenAI's clients send it or as Anthropic's do."""
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"authorization":
            scheme, _, key = text.partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and text:
            return text
    return None
