"""What a running deployment can take on from a changed configuration, and what it refuses.

A configuration takes effect whole or not at all. Pool sizes and everything that only the
controller and the routers read can change under load. What an engine, its hand-offs or its place
in the cluster were built from cannot: workers of both kinds would hand KV caches to each other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import TandemConfig, parse_config
from cluster.errors import ConfigError
from cluster.names import Role

# Sections and settings that can change under load.
LIVE = (
    "autoscaler",
    "router",
    "cluster.warmup",
    "cluster.standby",
    "cluster.start_timeout_s",
    "cluster.drain_s",
    "prefill.workers",
    "decode.workers",
    "placement.priority",
    "placement.min_units",
    "security.api_keys",
)
_SIZES = ("prefill.workers", "decode.workers")
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that differs, by its path in the configuration."""

    path: str
    running: object
    wanted: object

    @property
    def is_live(self) -> bool:
        return any(self.path == live or self.path.startswith(f"{live}.") for live in LIVE)

    def __str__(self) -> str:
        return f"{self.path} {_shown(self.running)} -> {_shown(self.wanted)}"


@dataclass(frozen=True, slots=True)
class InForce:
    """The configuration a deployment goes by. A `revision` is the Unix time at which the
    configuration was deployed; 0 for one that is not meant to replace another."""

    config: TandemConfig
    revision: float = 0.0

    def as_document(self) -> dict[str, Any]:
        document = self.config.model_dump(mode="json", exclude_unset=True)
        return {"revision": self.revision, "config": document}

    @classmethod
    def from_document(cls, document: Mapping[str, Any] | None) -> "InForce | None":
        """Return what was written down, None if nothing was, or nothing that we can read."""
        try:
            return cls(parse_config(document["config"]), document["revision"]) if document else None
        except (ConfigError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a configuration that was deployed later than the one in force.

    `refused` says why it does not take effect. `sizes` are the pools' under a configuration that
    does, None where nothing changes. `note` is for the operator.
    """

    in_force: InForce
    refused: str | None = None
    sizes: Mapping[Role, int] | None = None
    note: str | None = None


def judge(running: InForce, offered: InForce, sizes: Mapping[Role, int]) -> Verdict | None:
    """Return what to do about `offered` while the pools have `sizes`; None if it is no later.

    Workers that are configured anew leave the pools alone where the autoscaler sizes them.
    """
    if offered.revision <= running.revision:
        return None
    found = differences(running.config, offered.config)
    if (why := refusal(found)) is not None:
        kept = InForce(running.config, offered.revision)
        return Verdict(kept, refused=why, note=f"the deployed configuration is refused: {why}")
    if not found:
        return Verdict(offered)
    is_resized = any(each.path in _SIZES for each in found)
    if is_resized and offered.config.autoscaler.mode != "act":
        sizes = {role: offered.config.pool(role).workers for role in Role}
    return Verdict(offered, sizes=sizes, note=f"deployed: {'; '.join(map(str, found))}")


def differences(running: TandemConfig, wanted: TandemConfig) -> tuple[Difference, ...]:
    """Return every setting that differs, in the tree's order."""
    return tuple(_differences(running.model_dump(), wanted.model_dump(), ""))


def _differences(
    running: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str
) -> Iterator[Difference]:
    for key, before in running.items():
        after, path = wanted[key], f"{prefix}{key}"
        if prefix == "" and isinstance(before, Mapping):
            yield from _differences(before, after, f"{path}.")
        elif before != after:
            yield Difference(path, before, after)


def refusal(found: tuple[Difference, ...]) -> str | None:
    """Return why a running deployment cannot take these on, None if it can."""
    if fixed := [str(each) for each in found if not each.is_live]:
        return f"{'; '.join(fixed)}: needs other workers, so delete the app and deploy it again"
    return None


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
