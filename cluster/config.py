"""Every setting of Easel, frozen and checked. This file is the only reader of the environment and of YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cluster.engines import ENGINES
from cluster.errors import ConfigError
from cluster.security.settings import SecuritySettings

Port = Annotated[int, Field(ge=0, le=65535)]
# Ray labels of a node -> what they must be there; Ray itself checks the syntax of both.
Labels = Mapping[str, str]
DEFAULT_PORT = 8500
ENV_PREFIX = "EASEL__"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StateSettings(_Frozen):
    """Redis, which decides and remembers.

    `username` and `password_file` are for a URL without them: the file is read at every connection, so that a password
    can change. The other files are PEM, for rediss:// and rediss+sentinel://.
    """

    url: str = "redis://127.0.0.1:6379/0"
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "easel"
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    queue_limit: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    retry_after_ms: Annotated[int, Field(ge=1, le=600_000)] = 1000
    lease_ms: Annotated[int, Field(ge=500, le=600_000)] = 5000
    heartbeat_ms: Annotated[int, Field(ge=50, le=60_000)] = 1000
    retention_s: Annotated[int, Field(ge=1, le=30 * 86_400)] = 3600
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    max_preemptions: Annotated[int, Field(ge=0, le=100)] = 3
    aging_ms: Annotated[int, Field(ge=100, le=86_400_000)] = 60_000
    # At least what one request may bring: router.max_request_bytes goes up to this.
    image_limit_bytes: Annotated[int, Field(ge=64 * 2**20, le=2**40)] = 256 * 2**20
    outage_patience_s: Annotated[float, Field(gt=0, le=600)] = 30.0

    @field_validator("heartbeat_ms")
    @classmethod
    def _beats_within_a_lease(cls, heartbeat_ms: int, info: ValidationInfo) -> int:
        lease_ms = info.data.get("lease_ms", 0)
        if lease_ms and 2 * heartbeat_ms > lease_ms:
            raise ValueError(
                f"a lease of {lease_ms} ms must outlast two heartbeats; at most {lease_ms // 2} is allowed"
            )
        return heartbeat_ms


class ReplicaRange(_Frozen):
    """As few and as many replicas as load may bring; `scale_down_after_s` of less load come before there are fewer."""

    min_replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=10_000)]
    scale_down_after_s: Annotated[float, Field(ge=0, le=86_400)] = 120.0

    @field_validator("max_replicas")
    @classmethod
    def _not_below_the_least(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas", 0)
        if most < least:
            raise ValueError(f"min_replicas is {least}; at least that is allowed")
        return most


class DenoiserAutoscaling(ReplicaRange):
    """How many denoiser replicas there are, by the canvases that wait and run; docs/autoscaling.md.

    Under a steady load 95% of jobs are to wait less than `target_wait_s` for a slot. With `min_replicas` 0 the last
    replica goes after `idle_to_zero_after_s` without a job. `start_s` is what a new replica is thought to take until
    one was measured.
    """

    target_wait_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    idle_to_zero_after_s: Annotated[float, Field(ge=0, le=30 * 86_400)] = 900.0
    start_s: Annotated[float, Field(ge=0, le=3600)] = 60.0


class RouterAutoscaling(ReplicaRange):
    """How many routers there are, by their open connections."""

    min_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)]
    connections_per_router: Annotated[int, Field(ge=1, le=1_000_000)] = 500


class RouterSettings(_Frozen):
    """The public gRPC server. `health_port` is a plaintext port for the standard health service alone, for probes.

    `label_selector` and `max_per_node` say on which nodes routers run, and how many share one. A connection is closed
    `max_connection_age_s` after it was made (0: never), and what still streams on it by then gets
    `max_connection_age_grace_s` more: so that clients look up the routers again.
    """

    host: str = "127.0.0.1"
    port: Port = DEFAULT_PORT
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    autoscaling: RouterAutoscaling | None = None
    max_request_bytes: Annotated[int, Field(ge=1024, le=64 * 2**20)] = 4 * 2**20
    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    max_streams_per_connection: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    health_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    look_every_ms: Annotated[int, Field(ge=10, le=60_000)] = 250
    drain_timeout_s: Annotated[float, Field(ge=0, le=600)] = 5.0
    num_cpus: Annotated[float, Field(ge=0, le=256)] = 0.1
    label_selector: Labels = {}
    max_per_node: Annotated[int, Field(ge=1, le=100)] | None = None
    max_connection_age_s: Annotated[int, Field(ge=0, le=86_400)] = 0
    max_connection_age_grace_s: Annotated[int, Field(ge=1, le=86_400)] = 60

    @property
    def most_replicas(self) -> int:
        """As many as there may be at once."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


class VllmSettings(_Frozen):
    """What only the vllm engine takes. Names and meaning are vLLM's own (0.32)."""

    quantization: Literal["fp8", "modelopt", "modelopt_fp4", "nvfp4_per_token", "compressed-tensors"] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    enforce_eager: bool = False
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None


class DenoiserSettings(_Frozen):
    """The replicas that denoise; one replica is one tensor-parallel group of `tp` ranks.

    `placement` says where the ranks of a replica run: `strict_pack` on one node, `strict_spread` each on another node,
    `pack` and `spread` as near to that as there is room. `num_cpus` and `num_gpus` are for each rank, and
    `label_selector` chooses the nodes of all. Where `autoscaling` is set, that says how many replicas there are, and
    `replicas` is not used.
    """

    replicas: Annotated[int, Field(ge=1, le=10_000)] = 2
    autoscaling: DenoiserAutoscaling | None = None
    slots: Annotated[int, Field(ge=1, le=256)] = 8
    engine: Literal["torch", "vllm", "fake"] = "torch"
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    max_context_tokens: Annotated[int, Field(ge=1)] | None = None
    prefix_reuse: bool = True
    cuda_graphs: bool = True
    prefill_tiles_per_step: Annotated[int, Field(ge=1, le=1024)] = 4
    fake_step_ms: Annotated[float, Field(ge=0, le=60_000)] = 15.0
    fake_steps_per_canvas: Annotated[int, Field(ge=1, le=1000)] = 8
    host: str = "127.0.0.1"
    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = "strict_pack"
    num_cpus: Annotated[float, Field(ge=0, le=256)] = 1.0
    num_gpus: Annotated[float, Field(ge=0, le=1)] = 0.0
    label_selector: Labels = {}
    drain_timeout_s: Annotated[float, Field(ge=0, le=600)] = 5.0
    step_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    checkpoint_every_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    vllm: VllmSettings = VllmSettings()

    @field_validator("vllm")
    @classmethod
    def _only_with_vllm(cls, settings: VllmSettings, info: ValidationInfo) -> VllmSettings:
        engine, defaults = info.data.get("engine"), VllmSettings()
        mine = [name for name in VllmSettings.model_fields if getattr(settings, name) != getattr(defaults, name)]
        if engine != "vllm" and mine:
            raise ValueError(f"the {engine} engine takes none of it, and {', '.join(mine)} is set")
        return settings

    @field_validator("threads")
    @classmethod
    def _vllm_has_its_own_threads(cls, threads: int, info: ValidationInfo) -> int:
        if threads > 1 and info.data.get("engine") == "vllm":
            raise ValueError("the vllm engine chooses its own threads; only 1 is allowed with it")
        return threads

    @property
    def least_replicas(self) -> int:
        """As few as there may be: these need a place from the start."""
        return self.replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def most_replicas(self) -> int:
        """As many as there may be at once."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @field_validator("tp", "dtype", "device", "checkpoint_every_steps")
    @classmethod
    def _as_the_engine_can(cls, value: int | str, info: ValidationInfo) -> int | str:
        engine = ENGINES.get(info.data.get("engine", ""))
        refusal = engine.refuses(info.field_name or "", value) if engine else None
        if refusal:
            raise ValueError(refusal)
        return value

    @field_validator("num_gpus")
    @classmethod
    def _ranks_share_no_gpu(cls, gpus: float, info: ValidationInfo) -> float:
        ranks, device = info.data.get("tp", 1), info.data.get("device")
        if ranks > 1 and (0 < gpus < 1 or (gpus < 1 and device == "cuda")):
            raise ValueError(f"each of the {ranks} ranks needs a gpu of its own; 1 is allowed, or 0 on the cpu")
        return gpus


class TraceSettings(_Frozen):
    """OpenTelemetry traces, to a collector that speaks OTLP over gRPC; they need the extra `otel`.

    `sample_ratio` is the share of traces that are recorded, among calls whose caller has not decided that.
    """

    enabled: bool = False
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")] = "http://localhost:4317"
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    steps: bool = False
    queue_spans: Annotated[int, Field(ge=16, le=65_536)] = 2048
    export_timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0


class TelemetrySettings(_Frozen):
    """What a cluster tells about itself. Metrics go through Ray and need no setting."""

    traces: TraceSettings = TraceSettings()


class Settings(_Frozen):
    """All of it. `checkpoint` is the folder of the model that every replica serves."""

    checkpoint: str
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    state: StateSettings = StateSettings()
    router: RouterSettings = RouterSettings()
    denoiser: DenoiserSettings = DenoiserSettings()
    security: SecuritySettings = SecuritySettings()
    telemetry: TelemetrySettings = TelemetrySettings()


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Check a mapping (YAML, or the arguments of the Serve application). Raises ConfigError, one line per problem."""
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(item) for item in error.errors())) from None


def load_values(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file, unchecked. Raises ConfigError when it cannot be read or is no mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of settings, is {type(values).__name__}")
    return values


def overlay(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over` that are not None, section by section."""
    merged = dict(values)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and (below is None or isinstance(below, Mapping)):
            merged[name] = overlay(below or {}, value)
        elif value is not None and not isinstance(value, Mapping):
            merged[name] = value
    return merged


def environment_values() -> dict[str, Any]:
    """Settings from the environment, unchecked: EASEL__ROUTER__PORT=8600 is `router.port`.

    A value that begins with { or [ is JSON. Raises ConfigError for a name that no setting has.
    """
    values: dict[str, Any] = {}
    for name, text in sorted(os.environ.items()):
        if name.startswith(ENV_PREFIX):
            place, *path = _setting_path(name)[::-1]
            section = values
            for part in reversed(path):
                section = section.setdefault(part, {})
            section[place] = _env_value(name, text)
    return values


def _setting_path(name: str) -> list[str]:
    path = name.removeprefix(ENV_PREFIX).lower().split("__")
    section: type[BaseModel] | None = Settings
    for part in path:
        if section is None or part not in section.model_fields:
            raise ConfigError(f"{name}: no such setting; `easel config --schema` lists all of them")
        section = _section(section.model_fields[part].annotation)
    if section is not None:
        raise ConfigError(f"{name}: is a section; name one of its settings: {', '.join(section.model_fields)}")
    return path


def _section(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - whatever a field is annotated with
    """The section that a field is, or may be; None for a plain setting."""
    choices = (annotation, *get_args(annotation))
    return next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _env_value(name: str, text: str) -> Any:  # noqa: ANN401 - JSON
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{name}: begins like JSON, but is not: {text!r}") from None


def _problem(item: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown setting; see cluster/config.py for all of them"
    if item["type"] == "model_type":
        return f"{name}: must be a section of settings, is {item['input']!r}"
    if item["type"] == "missing":
        return f"{name}: must be set"
    return f"{name}: {item['input']!r} is not allowed: {item['msg'].removeprefix('Value error, ').lower()}"


def state_dir() -> Path:
    """Where the local cluster keeps its state and logs: $EASEL_HOME, else the XDG state folder."""
    home = os.environ.get("EASEL_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "easel"


def router_address() -> str | None:
    """The router that commands talk to when none is named: $EASEL_ADDRESS, or None."""
    return os.environ.get("EASEL_ADDRESS") or None


def credential_environment() -> dict[str, str]:
    """What commands show a cluster and trust of it, as far as EASEL_API_KEY, EASEL_CA_FILE and the like say it."""
    names = ("api_key", "api_key_file", "tls", "ca_file", "cert_file", "key_file", "server_name")
    found = {name: os.environ.get(f"EASEL_{name.upper()}") for name in names}
    return {name: value for name, value in found.items() if value}


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a process that Easel starts: ours, without Ray's usage reports, plus `extra`."""
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", **extra}
