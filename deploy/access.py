"""How tandem's own commands get into an endpoint: where it is, with which key, by whose word."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from cluster.config import SecuritySection
from cluster.errors import ConfigError
from cluster.watched_file import read_parsed
from deploy.private_file import read_secret
from router.api_keys import parse_api_keys


@dataclass(frozen=True, slots=True)
class Access:
    """One endpoint; `operator_key` and `certificate` are files, None where none is needed; `more`
    are headers that go over ours."""

    url: str
    operator_key: str | None = None
    certificate: str | None = None
    more: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, host_and_port: str, section: SecuritySection) -> "Access":
        scheme = "http" if section.tls_cert is None else "https"
        return cls(f"{scheme}://{host_and_port}", section.operator_key, section.tls_cert)

    def headers(self) -> Mapping[str, str]:
        """Return the headers that a request needs; raise `ConfigError` if the key is not there."""
        if self.operator_key is None:
            return self.more
        return {"authorization": f"Bearer {read_secret(Path(self.operator_key))}", **self.more}

    def get(
        self, path: str, timeout_s: float, params: Mapping[str, str | int] | None = None
    ) -> httpx.Response:
        """Ask the endpoint; raise `ConfigError` for a file that is not there, httpx's errors."""
        return httpx.get(
            f"{self.url}{path}",
            params=params,
            headers=dict(self.headers()),
            timeout=timeout_s,
            trust_env=False,
            verify=True if self.certificate is None else trust_in(self.certificate),
        )


def trust_in(certificate: str) -> ssl.SSLContext:
    """Return what trusts exactly the certificate in a file; raise `ConfigError`."""
    try:
        context = ssl.create_default_context(cafile=certificate)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{certificate}: {error}") from None
    # Who holds the very certificate may be asked under any name, as on loopback.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def require_readable(section: SecuritySection) -> None:
    """Raise `ConfigError` now for what the endpoint would stumble over while it starts."""
    if section.api_keys is not None:
        read_parsed(Path(section.api_keys), parse_api_keys)
    if section.operator_key is not None:
        read_secret(Path(section.operator_key))
    if section.tls_cert is not None and section.tls_key is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                section.tls_cert, section.tls_key, password=""
            )
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"security.tls_cert and .tls_key do not serve: {error}") from None
