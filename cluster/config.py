"""The one configuration tree: a strict, frozen model loaded from one YAML file.

Unknown keys are refused with their path and the nearest valid key. Defaults exist here and
nowhere else; each part receives its own section.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.autoscaler_config import AutoscalerSection
from cluster.errors import ConfigError
from cluster.names import Role
from cluster.section import Count, Seconds, Section

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "models" / "tandem-tiny"


def _names(value: object) -> object:
    """Split "A,B", as a command line writes a list, and refuse a name given twice."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and (len({*map(str, names)}) < len(names) or "" in names):
        raise ValueError("names must be different and not empty")
    return names


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class ModelSection(Section):
    """What is served, and how each engine is built; both pools get the same engine."""

    path: str = Field(str(BUNDLED_MODEL), description="Hugging Face folder or name")
    served_name: str | None = Field(None, description="name in the API; default: folder name")
    engine: Literal["vllm", "simulated"] = Field("vllm", description="engine implementation")
    dtype: str = Field("auto", description="weights and KV dtype, as vLLM takes it")
    max_model_len: Count | None = Field(None, description="context in tokens; default: model's")
    block_size: Count | None = Field(None, description="tokens per KV block; default: engine's")
    chunk_tokens: Count = Field(2048, description="prompt tokens computed per step")
    max_num_seqs: Count = Field(64, description="requests batched per step")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="KV cache per worker in GiB; default: 1 on CPU, vLLM's on GPU"
    )
    seed: int = Field(0, description="engine seed")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="further vLLM engine arguments, by their Python name"
    )
    frontend_args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM front-end arguments by their Python name, as tool_call_parser",
    )

    @property
    def kv_cache_bytes(self) -> int | None:
        """Bytes of KV cache per worker, None for the engine's own choice."""
        return None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30)

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_name or Path(self.path).name


class PoolSection(Section):
    """One pool of workers."""

    workers: Count = Field(1, description="workers in this pool")
    cpus_per_worker: Count = Field(1, description="cores pinned to each worker's engine")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="GPUs per worker")
    gpu_types: Names = Field((), description="GPU types, preferred first (A,B); none: any")
    tensor_parallel_size: Count = Field(1, description="vLLM processes one worker is split over")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="laid over `model.engine_args` in this pool"
    )

    @model_validator(mode="after")
    def _gpu_types_need_gpus(self) -> Self:
        if self.gpu_types and not self.gpus_per_worker:
            raise ValueError("gpu_types are named but gpus_per_worker is 0: set it or drop them")
        return self

    def has_same_engine(self, other: "PoolSection") -> bool:
        """Return whether a worker of this pool could serve in the other one as it is."""
        return self.model_copy(update={"workers": other.workers}) == other


class PlacementSection(Section):
    """Where workers go, and who yields when there is not room for all."""

    affinity: Literal["s1", "s2", "cluster"] = Field(
        "s2", description="workers that hand over to each other stay under one such switch"
    )
    priority: int = Field(0, description="deployments with more go first and may shrink others")
    min_units: Annotated[int, Field(ge=0)] = Field(
        1, description="units of the P:D ratio that others cannot take away"
    )


class HandoffSection(Section):
    """How KV caches change owner."""

    lease_s: Seconds = Field(30.0, description="held blocks are freed this long after last use")
    chunk_bytes: Count = Field(4 << 20, description="payload bytes per message, about")
    reads_in_flight: Count = Field(4, description="chunks a consumer asks for ahead")
    transports: Annotated[
        tuple[Literal["cma", "shm", "tcp", "gloo", "cuda_ipc", "nccl"], ...],
        BeforeValidator(_names),
    ] = Field(
        ("cma", "shm", "tcp"),
        min_length=1,
        description="ways payloads may go, preferred first (A,B)",
    )
    arena_mib: Count = Field(
        32,
        description="memory per engine process for each of `shm`, `cuda_ipc` and `nccl`, taken at"
        " first contact",
    )
    tcp_connections: Count = Field(2, description="connections a pair spreads its payloads over")
    checksum: bool = Field(True, description="checksum every chunk (xxh3-64)")
    wire_dtype: Literal["as_is", "int8", "fp8"] = Field(
        "as_is", description="what KV numbers travel as; a byte each is quicker and changes tokens"
    )
    stall_timeout_s: Seconds = Field(3.0, description="a pull without progress fails after this")
    bind_host: str = Field("127.0.0.1", description="address the KV plane listens on")
    fault: Literal["none", "corrupt_received_block"] = Field(
        "none", description="for tests: damages one block of every chunk received"
    )


class RouterSection(Section):
    """The HTTP endpoint and admission."""

    host: str = Field("127.0.0.1", description="address the endpoint listens on")
    port: int = Field(8000, ge=1, le=65535, description="port the endpoint listens on")
    replicas: Count = Field(1, description="router replicas")
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Ray resources a replica takes: pins it to nodes with them",
    )
    proxy: Literal["haproxy", "serve"] = Field(
        "haproxy", description="HTTP proxy of a Ray started here; docs/deployment.md compares them"
    )
    max_body_bytes: Count = Field(8 << 20, description="larger request bodies get 413")
    request_deadline_s: Seconds = Field(600.0, description="a request is ended after this")
    max_sequences: Count = Field(
        128, description="sequences one HTTP request may run, prompts times `n`; more get 400"
    )
    max_queued: Count = Field(1024, description="requests waiting for placement; more get 429")
    prefills_per_worker: Count = Field(8, description="prompts in flight per prefill worker")
    decodes_per_worker: Count = Field(256, description="streams in flight per decode worker")
    local_prefill_tokens: Annotated[int, Field(ge=0)] = Field(
        1, description="prompts up to this length are prefilled on the decode worker"
    )
    recovery: Literal["elsewhere", "none"] = Field(
        "elsewhere", description="after a failed hand-off: prefill again elsewhere, else local"
    )
    max_attempts: Count = Field(4, description="placements tried per request")
    worker_timeout_s: Seconds = Field(
        3.0,
        description="a silent worker is lost after this; for a worker a silent router is, three "
        "times as long after where its connection is up",
    )
    records: Count = Field(2000, description="request records kept for look-up")


class SimulatedSection(Section):
    """Timing model of the simulated engine."""

    prefill_tokens_per_s: Annotated[float, Field(gt=0)] = Field(20_000.0)
    decode_step_s: Seconds = Field(0.01, description="time of a decode step with one request")
    decode_step_per_request_s: Annotated[float, Field(ge=0)] = Field(0.0002)
    num_blocks: Count = Field(512, description="KV blocks per simulated worker")
    block_bytes: Count = Field(4096, description="bytes per simulated KV block")


class ClusterSection(Section):
    """Which Ray cluster, under which name."""

    name: str = Field("tandem", pattern=r"^[a-z][a-z0-9-]{0,30}$", description="deployment name")
    address: str | None = Field(None, description="existing Ray cluster; default: start one")
    warmup: bool = Field(True, description="new workers must pass a warm-up hand-off")
    start_timeout_s: Seconds = Field(300.0, description="workers must be ready within this")
    drain_s: Seconds = Field(5.0, description="running requests may take this long to end at stop")
    orphan_s: Seconds = Field(
        180.0, description="workers end this long after the deployment or Ray's head is gone"
    )
    standby: Annotated[int, Field(ge=0)] = Field(
        0, description="workers kept loaded beside the pools, to serve within a second"
    )


class TracingSection(Section):
    """Traces of requests, by OpenTelemetry."""

    endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OTLP/HTTP collector, as http://host:4318/v1/traces; default: no traces",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share traced of the requests that bring no trace of their own"
    )


class SecuritySection(Section):
    """Who may use the endpoint, and how the processes of a deployment know each other."""

    api_keys: str | None = Field(
        None, description="file of API keys, on every node with a router; default: none are asked"
    )
    operator_key: str | None = Field(
        None, description="file with the admin key that tandem's own commands send"
    )
    tls_cert: str | None = Field(
        None, description="certificate chain (PEM) of the endpoint; default: plain HTTP"
    )
    tls_key: str | None = Field(None, description="private key (PEM) of `tls_cert`")
    curve: bool = Field(
        True, description="encrypt the sockets between processes and admit members only (CURVE)"
    )
    curve_keys: str | None = Field(
        None,
        description="file of CURVE keys, on every node; default: made here, handed on through Ray",
    )
    key_overlap_s: Seconds = Field(
        300.0, description="CURVE keys made here: old ones are accepted this long after a change"
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: name both or neither")
        if self.curve_keys is not None and not self.curve:
            raise ValueError("curve_keys are named but curve is off: switch it on or drop them")
        return self


class TandemConfig(Section):
    """The whole tree."""

    cluster: ClusterSection = ClusterSection()
    model: ModelSection = ModelSection()
    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()
    router: RouterSection = RouterSection()
    handoff: HandoffSection = HandoffSection()
    simulated: SimulatedSection = SimulatedSection()
    placement: PlacementSection = PlacementSection()
    autoscaler: AutoscalerSection = AutoscalerSection()
    tracing: TracingSection = TracingSection()
    security: SecuritySection = SecuritySection()

    def pool(self, role: Role) -> PoolSection:
        return self.prefill if role is Role.PREFILL else self.decode

    @model_validator(mode="after")
    def _limits_hold_the_pools(self) -> Self:
        section = self.autoscaler
        for role, workers in (("prefill", self.prefill.workers), ("decode", self.decode.workers)):
            fewest, most = getattr(section, f"min_{role}"), getattr(section, f"max_{role}")
            if section.mode == "act" and not fewest <= workers <= most:
                raise ValueError(
                    f"{role}.workers ({workers}) is outside autoscaler.min_{role} ({fewest}) to"
                    f" autoscaler.max_{role} ({most}): change one of them"
                )
        needed = {"min_prefill and min_decode": (section.min_prefill, section.min_decode)}
        needed |= {f"calendar window {w}": (w.prefill, w.decode) for w in section.calendar}
        for name, (prefill, decode) in needed.items():
            gpus = prefill * self.prefill.gpus_per_worker + decode * self.decode.gpus_per_worker
            if section.gpu_budget is not None and gpus > section.gpu_budget:
                raise ValueError(
                    f"autoscaler.gpu_budget ({section.gpu_budget:g}) is below the {gpus:g} GPUs of"
                    f" {name}: raise it or lower them"
                )
        return self


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class an annotation holds, None for a leaf."""
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation) if origin in (types.UnionType, typing.Union) else ()
    for part in parts or (annotation,):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _unknown_keys(section: type[Section], document: Any, path: str) -> Iterator[str]:
    if not isinstance(document, Mapping):
        return
    for key, value in document.items():
        field = section.model_fields.get(str(key))
        if field is None:
            nearest = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.0)
            yield f"unknown key {path}{key!s} (nearest valid key: {path}{nearest[0]})"
        elif inner := section_of(field.annotation):
            yield from _unknown_keys(inner, value, f"{path}{key}.")


def parse_config(document: Any) -> TandemConfig:
    """Return the configuration `document` describes; raise `ConfigError` naming every fault."""
    if not isinstance(document or {}, Mapping):
        raise ConfigError("the configuration must be a mapping of sections")
    unknown = list(_unknown_keys(TandemConfig, document or {}, ""))
    if unknown:
        raise ConfigError("; ".join(unknown))
    try:
        return TandemConfig.model_validate(document or {})
    except ValidationError as error:
        raise ConfigError(faults_of(error)) from None


def faults_of(error: ValidationError) -> str:
    """Return every fault with its path, on one line."""
    return "; ".join(map(_fault_line, error.errors()))


def _fault_line(fault: ErrorDetails) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    says = fault["msg"].removeprefix("Value error, ")
    # A fault of a section as a whole says itself which of its settings do not fit together.
    is_whole = fault["type"] == "value_error" and isinstance(fault["input"], Mapping)
    got = "" if is_whole else f" (got {fault['input']!r})"
    return f"{path}: {says}{got}" if path else f"{says}{got}"


def load_config(path: Path) -> TandemConfig:
    """Return the configuration in the YAML file at `path`; raise `ConfigError`."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    try:
        return parse_config(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(typing.cast(Any, below), value) if both else value
    return merged
