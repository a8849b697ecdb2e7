"""The operator's settings of every program: frozen dataclasses, which check themselves.

Knows neither where values come from (`outrider.settings.loader`) nor what the settings do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

from outrider.settings.fields import require, require_address, require_port, setting
from outrider.settings.redis_address import RedisAddress
from outrider.settings.security import OrchestratorSettings, TierSettings
from outrider.settings.simulation import Simulation
from outrider.settings.telemetry import TelemetrySettings

Config = TypeVar("Config")


_OF_MODELS = (
    "dtype", "device", "device_map", "max_model_len", "num_threads", "prepack", "forbid_kernels",
    "attention_backend", "cuda_graphs", "inflate_parameters", "generation_config",
    "tokenizer_eos",
)  # fmt: skip


@dataclass(frozen=True)
class ModelServiceConfig(TierSettings, TelemetrySettings):
    """What the two model services share."""

    model: str = setting("", "directory or hub name of a causal language model")
    simulate: str | None = setting(
        None, "no model: passes of given cost and acceptance, as in step_ms=25,row_ms=0.5"
    )
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(0, "port to listen on; 0 picks a free one")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    device_map: str | None = setting(None, "for instance auto: spread the layers over devices")
    kv_cache_tokens: int | None = setting(None, "tokens of KV cache; unset: from free memory")
    max_model_len: int | None = setting(
        None, "longest prompt and output together; unset: the model's context"
    )
    num_threads: int | None = setting(None, "CPU threads of the forward pass")
    prepack: bool = setting(True, "prepack linear layers for oneDNN on CPU")
    forbid_kernels: str = setting(
        "", "CPU kernels not to use, separated by commas: onednn_float32, onednn_bfloat16"
    )
    attention_backend: str = setting("auto", "auto, torch or flashinfer")
    cuda_graphs: bool = setting(True, "replay single-token steps from CUDA graphs where faster")
    inflate_parameters: int | None = setting(
        None, "pad the quickstart target to the cost of so many parameters"
    )
    generation_config: str = setting(
        "auto", "auto: defaults of requests from generation_config.json, as vLLM; none: without"
    )
    tokenizer_eos: bool = setting(True, "the tokenizer's own end token ends outputs, as in vLLM")
    max_gamma: int = setting(16, "most draft tokens of a round")
    max_step_tokens: int = setting(512, "tokens per forward pass that prompts may fill up to")
    idle_session_ttl_s: float = setting(600.0, "how long KV of an ended turn is kept")
    prefix_cache: bool = setting(True, "re-use keys and values of prompts that begin alike")
    calibration_s: float = setting(3.0, "how long to measure what passes cost, at the start")
    redis_url: str | None = setting(
        None, "where the replica announces itself; unset: nowhere", may_be_secret=True
    )
    advertise: str | None = setting(
        None, "host:port that others reach it at; unset: where it listens"
    )
    stuck_after_s: float = setting(
        3.0, "a pass that takes so long, and ten times what is usual, makes the replica not ready"
    )
    stuck_exit_s: float = setting(300.0, "stuck for so long, the program ends")
    stop_grace_s: float = setting(5.0, "how long open generations may go on at a stop")
    log_level: str = setting("info", "debug, info, warning or error")
    log_json: bool = setting(False, "log JSON lines")

    def __post_init__(self) -> None:
        if self.simulate is None:
            require(bool(self.model), "model", "is required: a directory or a hub name")
        else:
            require(not self.model, "simulate", "not together with a model")
            Simulation.parse(self.simulate, is_draft=isinstance(self, DraftConfig))
            for entry in fields(self):
                is_default = getattr(self, entry.name) == entry.default
                require(
                    is_default or entry.name not in _OF_MODELS,
                    entry.name,
                    "not together with simulate: there is no model",
                )
        require_port(self.port)
        is_known = self.generation_config in ("auto", "none")
        require(is_known, "generation_config", "must be auto or none")
        require(self.max_gamma >= 1, "max_gamma", "must be 1 or more")
        require(self.max_step_tokens >= 1, "max_step_tokens", "must be 1 or more")
        require(self.idle_session_ttl_s > 0, "idle_session_ttl_s", "must be more than 0")
        require(self.calibration_s >= 0, "calibration_s", "must be 0 or more")
        require(self.stuck_after_s > 0, "stuck_after_s", "must be more than 0")
        require(self.stuck_exit_s > 0, "stuck_exit_s", "must be more than 0")
        require(self.stop_grace_s >= 0, "stop_grace_s", "must be 0 or more")
        if self.advertise is not None:
            require_address(self.advertise, "advertise")
        self.check_server()
        self.check_telemetry()
        if self.redis_url is not None:
            self.redis_at(self.redis_url)  # raises where the settings do not fit it
        for name, least in (("kv_cache_tokens", 16), ("num_threads", 1), ("max_model_len", 2)):
            value = getattr(self, name)
            require(value is None or value >= least, name, f"must be {least} or more")

    @property
    def redis(self) -> RedisAddress | None:
        """The registry's; None: there is none."""
        return self.redis_at(self.redis_url) if self.redis_url is not None else None


@dataclass(frozen=True)
class TargetConfig(ModelServiceConfig):
    """`python -m target_service`."""

    port: int = setting(50052, "port to listen on; 0 picks a free one")


@dataclass(frozen=True)
class DraftConfig(ModelServiceConfig):
    """`python -m draft_service`."""

    port: int = setting(50053, "port to listen on; 0 picks a free one")
    max_branches: int = setting(64, "most branches drafted ahead of verdicts at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_branches >= 0, "max_branches", "must be 0 or more")


@dataclass(frozen=True)
class OrchestratorConfig(OrchestratorSettings, TelemetrySettings):
    """`python -m orchestrator`."""

    target_endpoint: str = setting(
        "127.0.0.1:50052", "host:port of each target replica, with commas between; or: registry"
    )
    draft_endpoint: str | None = setting(
        "127.0.0.1:50053", "likewise of the draft replicas; empty: no draft"
    )
    tokenizer: str | None = setting(None, "directory or hub name; unset: token ids only")
    assume_same_vocabulary: bool = setting(
        False,
        "pair models of which one has no tokenizer: the operator knows that ids mean the same",
    )
    redis_url: str = setting(
        "redis://127.0.0.1:6379/0", "where sessions are kept", env="REDIS_URL", may_be_secret=True
    )
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(50051, "port to listen on; 0 picks a free one")
    gamma: int | None = setting(
        None, "draft tokens per round where a request does not say; unset: by what they are worth"
    )
    max_gamma: int = setting(16, "most draft tokens per round a request may ask for")
    lookahead: int = setting(4, "most rounds drafted ahead of the one under verification")
    fan_out: int = setting(32, "most outcomes of one round that are drafted ahead")
    default_max_tokens: int = setting(256, "max_tokens where a request does not say")
    max_generations: int = setting(256, "generations at a time")
    max_waiting: int = setting(64, "requests that may wait for their turn; more are refused")
    draft_wait: str = setting(
        "adaptive", "rounds wait for draft tokens: adaptive, as long as it is worth; or always"
    )
    draft_wait_ms: float | None = setting(
        None, "longest wait for a proposal; unset: as long as it is worth (always: 10 s)"
    )
    verdict_timeout_s: float = setting(120.0, "longest wait for a target's reply to a row")
    target_wait_s: float = setting(15.0, "longest wait for a target replica when none is there")
    write_timeout_s: float = setting(30.0, "a stream that its client has not read for so long ends")
    connection_age_s: float = setting(
        300.0,
        "a caller's connection of this age takes no new calls, so that it makes another; 0: never",
    )
    connection_age_grace_s: float = setting(
        3600.0, "how long the calls of such a connection may still run"
    )
    durability: str = setting(
        "durable", "durable: tokens are in Redis before they are sent; fast: as soon as can be"
    )
    without_redis: str = setting(
        "refuse", "new one-off generations while Redis is away: refuse, or unrecorded"
    )
    stop_grace_s: float = setting(2.0, "how long running outputs may go on at a stop")
    redis_wait_s: float = setting(0.0, "how long a start waits for a Redis that is away")
    session_ttl_s: float = setting(3600.0, "sessions unused for so long expire")
    max_sessions_per_key: int = setting(
        10_000, "sessions of an API key that has no limit of its own (api_keys_file)"
    )
    log_level: str = setting("info", "debug, info, warning or error")
    log_json: bool = setting(False, "log JSON lines")

    def __post_init__(self) -> None:
        require_port(self.port)
        require(bool(self.target_endpoint), "target_endpoint", "is required: host:port")
        require(self.max_gamma >= 0, "max_gamma", "must be 0 or more")
        require(
            self.gamma is None or 0 <= self.gamma <= self.max_gamma,
            "gamma",
            f"must be 0 to max_gamma ({self.max_gamma})",
        )
        require(
            self.draft_wait_ms is None or self.draft_wait_ms >= 0,
            "draft_wait_ms",
            "must be 0 or more",
        )
        require(0 <= self.lookahead <= 4, "lookahead", "must be 0 to 4")
        require(1 <= self.fan_out <= 64, "fan_out", "must be 1 to 64")
        require(self.default_max_tokens >= 1, "default_max_tokens", "must be 1 or more")
        require(self.max_generations >= 1, "max_generations", "must be 1 or more")
        require(self.max_waiting >= 0, "max_waiting", "must be 0 or more")
        require(self.session_ttl_s > 0, "session_ttl_s", "must be more than 0")
        require(self.max_sessions_per_key >= 1, "max_sessions_per_key", "must be 1 or more")
        require(self.verdict_timeout_s > 0, "verdict_timeout_s", "must be more than 0")
        require(self.target_wait_s >= 0, "target_wait_s", "must be 0 or more")
        require(self.write_timeout_s > 0, "write_timeout_s", "must be more than 0")
        for name in ("connection_age_s", "connection_age_grace_s"):
            age_s = getattr(self, name)
            require(0 <= age_s <= MAX_AGE_S, name, f"must be from 0 to {MAX_AGE_S:.0f}")
        require(self.stop_grace_s >= 0, "stop_grace_s", "must be 0 or more")
        require(self.redis_wait_s >= 0, "redis_wait_s", "must be 0 or more")
        self.check_server()
        self.check_telemetry()
        self.redis_at(self.redis_url)  # raises where the settings do not fit it
        for name, values in _CHOICES:
            require(getattr(self, name) in values, name, f"must be {' or '.join(values)}")

    @property
    def redis(self) -> RedisAddress:
        return self.redis_at(self.redis_url)

    @property
    def target_endpoints(self) -> tuple[str, ...]:
        """Empty where the registry tells."""
        return _endpoints(self.target_endpoint)

    @property
    def draft_endpoints(self) -> tuple[str, ...]:
        """Likewise."""
        return _endpoints(self.draft_endpoint or "")


# Of a connection: gRPC counts milliseconds in 32 bits.
MAX_AGE_S = 2_000_000.0
_CHOICES = (
    ("durability", ("durable", "fast")),
    ("without_redis", ("refuse", "unrecorded")),
    ("draft_wait", ("adaptive", "always")),
)
REGISTRY = "registry"


def _endpoints(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if parts == (REGISTRY,) else parts
