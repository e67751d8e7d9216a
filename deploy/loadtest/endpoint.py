"""The endpoint under test: what it serves, and requests as it reads them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from cluster.errors import ConfigError, Unavailable
from deploy.access import Access
from deploy.loadtest.connection import Address
from deploy.loadtest.prompts import text_of
from deploy.loadtest.words import Send, Tokenizer

Api = Literal["completions", "chat"]

_PATHS: Mapping[str, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible endpoint and one of its models.

    `tokenizer` is where it says the model comes from; `extra` are fields laid over every
    request's body, None removes one; `certificate` is the file of its own, if it is pinned.
    """

    url: str
    model: str
    context_tokens: int | None = None
    tokenizer: str | None = None
    api: Api = "completions"
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    certificate: str | None = None

    @property
    def address(self) -> Address:
        parts = urlsplit(self.url)
        is_tls = parts.scheme == "https"
        assert parts.hostname is not None
        port = parts.port or (443 if is_tls else 80)
        return Address(parts.hostname, port, is_tls, self.certificate)

    def post(self, send: Send, tokenizer: Tokenizer | None) -> bytes:
        """Return a whole HTTP request that streams the completion of `send`.

        Chat takes text: the prompt's tokens go out decoded, as one message of the user.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": send.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            # An answer may carry several tokens, so each says how many there are by now.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.api == "chat":
            if tokenizer is None:
                raise ConfigError("chat takes text: name the model's tokenizer with --tokenizer")
            text = text_of(tokenizer, send.prompt_token_ids)
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = send.prompt_token_ids
        body |= self.extra
        body = {name: value for name, value in body.items() if value is not None}
        return self._request("POST", _PATHS[self.api], json.dumps(body).encode())

    def get(self, path: str) -> bytes:
        """Return a whole HTTP request that reads `path`."""
        return self._request("GET", path, b"")

    def _request(self, verb: str, path: str, body: bytes) -> bytes:
        address = self.address
        prefix = urlsplit(self.url).path.rstrip("/")
        host = f"[{address.host}]" if ":" in address.host else address.host
        headers = {
            "host": f"{host}:{address.port}",
            "content-type": "application/json",
            "content-length": str(len(body)),
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{verb} {prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def discover(access: Access, model: str | None = None) -> Endpoint:
    """Return the endpoint with its model, the only or first one if none is named.

    Raise `Unavailable` if nobody answers there, `ConfigError` for an address that is none.
    """
    url = normalised(access.url)
    document = _models(replace(access, url=url))
    try:
        served = {str(each["id"]): each for each in document["data"]}
        name = model or next(iter(served))
        found = served.get(name, {})
    except (LookupError, TypeError, AttributeError, StopIteration):
        raise Unavailable(f"{url}/v1/models: lists no models") from None
    if model is not None and model not in served:
        raise ConfigError(f"{url} serves {', '.join(served)}, not {model}")
    context = found.get("max_model_len")
    root = found.get("root")
    return Endpoint(
        url,
        name,
        int(context) if context is not None else None,
        str(root) if root is not None else None,
        headers=access.headers(),
        certificate=access.certificate,
    )


def normalised(url: str) -> str:
    """Return the address without a trailing slash or "/v1"; raise `ConfigError` if it is none."""
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    try:
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"--url {url}: not an address like http://127.0.0.1:8000")
    return url


def _models(access: Access) -> Any:
    try:
        return access.get("/v1/models", _TIMEOUT_S).raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"{access.url}/v1/models: {error}") from None
