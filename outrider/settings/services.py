"""Settings of the three programs: frozen dataclasses that validate themselves.

`outrider.settings.loader` fills them from flags and environment variables.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.addresses import require_address, require_endpoint, require_host
from outrider.settings.draft_canary import DraftCanarySettings
from outrider.settings.fields import require, require_port, setting
from outrider.settings.model import ModelSettings
from outrider.settings.observation import ObservationSettings
from outrider.settings.parallel import ParallelSettings
from outrider.settings.redis_address import RedisAddress
from outrider.settings.security import OrchestratorSettings, TierSettings
from outrider.settings.telemetry import TelemetrySettings
from outrider.settings.tokenizer import TokenizerSettings


@dataclass(frozen=True)
class ModelServiceConfig(ModelSettings, ParallelSettings, TierSettings, TelemetrySettings):
    """Settings that the target service and the draft service share."""

    host: str = setting("127.0.0.1", "host name or IP address to listen on")
    port: int = setting(0, "port to listen on; 0 picks a free one")
    max_gamma: int = setting(16, "maximum draft tokens per round")
    max_step_tokens: int = setting(
        512, "prompts are prefilled in chunks that fill a forward pass up to this many tokens"
    )
    idle_session_ttl_s: float = setting(600.0, "seconds to cache the KV of an idle session")
    prefix_cache: bool = setting(True, "reuse the KV of prompts with a common prefix")
    calibration_s: float = setting(3.0, "seconds spent at start measuring forward passes")
    redis_url: str | None = setting(
        None,
        "Redis in which the replica registers itself; several, comma-separated; unset: no registry",
        may_be_secret=True,
    )
    advertise: str | None = setting(
        None, "host:port at which orchestrators reach this replica; unset: where it listens"
    )
    stuck_after_s: float = setting(
        3.0,
        "a replica is not ready while a pass exceeds 10 times its usual duration by these seconds",
    )
    stuck_exit_s: float = setting(
        300.0, "the program exits when a pass is stuck for this many seconds"
    )
    stop_grace_s: float = setting(5.0, "seconds that running generations may take at shutdown")
    log_level: str = setting("info", "debug, info, warning or error")
    log_json: bool = setting(False, "log JSON lines")

    def __post_init__(self) -> None:
        self.check_model(is_draft=isinstance(self, DraftConfig))
        _require_listen_host(self.host)
        require_port(self.port)
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
        self.check_parallel()
        _ = self.registries  # raises where the settings do not fit a URL

    @property
    def registries(self) -> tuple[RedisAddress, ...]:
        """Each Redis in which the replica registers itself: one for each target that it serves."""
        return self.redis_each(self.redis_url) if self.redis_url is not None else ()


@dataclass(frozen=True)
class TargetConfig(ModelServiceConfig):
    """`python -m target_service`."""

    port: int = setting(50052, "port to listen on; 0 picks a free one")


@dataclass(frozen=True)
class DraftConfig(ModelServiceConfig):
    """`python -m draft_service`."""

    port: int = setting(50053, "port to listen on; 0 picks a free one")
    max_branches: int = setting(64, "maximum branches drafted ahead of verification at a time")
    target_tokenizer: str | None = setting(
        None, "tokenizers of targets of other families, comma-separated: re-encode their text"
    )

    @property
    def target_tokenizers(self) -> tuple[str, ...]:
        parts = (part.strip() for part in (self.target_tokenizer or "").split(","))
        return tuple(filter(None, parts))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_branches >= 0, "max_branches", "must be 0 or more")


@dataclass(frozen=True)
class OrchestratorConfig(
    TokenizerSettings,
    OrchestratorSettings,
    DraftCanarySettings,
    ObservationSettings,
    TelemetrySettings,
):
    """`python -m orchestrator`."""

    target_endpoint: str = setting(
        "127.0.0.1:50052",
        "host:port of each target replica, comma-separated; or the word registry: in Redis",
    )
    draft_endpoint: str | None = setting(
        "127.0.0.1:50053",
        "host:port of each draft replica, comma-separated; or the word registry; empty: no drafts",
    )
    redis_url: str = setting(
        "redis://127.0.0.1:6379/0",
        "URL of the Redis that stores the sessions; also read from REDIS_URL",
        env="REDIS_URL",
        may_be_secret=True,
    )
    host: str = setting("127.0.0.1", "host name or IP address to listen on")
    port: int = setting(50051, "port to listen on; 0 picks a free one")
    gamma: int | None = setting(
        None, "draft tokens per round (γ) of requests that set none; unset: adaptive"
    )
    max_gamma: int = setting(16, "maximum draft tokens per round that a request may set")
    lookahead: int = setting(4, "maximum rounds drafted ahead of the one being verified")
    fan_out: int = setting(
        32, "maximum verify outcomes (accepted length, next token) per round that are drafted ahead"
    )
    default_max_tokens: int = setting(256, "max_tokens of requests that set none")
    max_generations: int = setting(256, "maximum generations that run at a time")
    max_waiting: int = setting(64, "maximum queued requests; further ones are rejected")
    prompt_lookup: bool = setting(False, "draft tokens from earlier text, where that is faster")
    prompt_lookup_pool: int = setting(
        0, "tokens of past outputs that prompt lookup searches, each API key its own; 0: none"
    )
    draft_wait: str = setting(
        "adaptive",
        "how long a round waits for draft tokens: adaptive (while it pays) or always",
    )
    draft_wait_ms: float | None = setting(
        None,
        "longest wait for draft tokens in milliseconds; unset: adaptive (draft_wait always: 10 s)",
    )
    verify_timeout_s: float = setting(
        120.0,
        "longest wait in seconds for the result of a verify request",
        renamed_from="verdict_timeout_s",
    )
    target_wait_s: float = setting(
        15.0, "longest wait in seconds for a target replica while none is available"
    )
    write_timeout_s: float = setting(
        30.0, "seconds after which a stream is ended if its client does not read"
    )
    connection_age_s: float = setting(
        300.0,
        "age in seconds at which a client connection is asked to reconnect; 0: never",
    )
    connection_age_grace_s: float = setting(
        3600.0, "seconds that requests may still run on a connection of connection_age_s"
    )
    durability: str = setting(
        "durable",
        "durable: write tokens to Redis before they are sent; fast: write them afterwards",
    )
    without_redis: str = setting(
        "refuse",
        "generations without a session while Redis is down: refuse them; or unrecorded: run them",
    )
    stop_grace_s: float = setting(2.0, "seconds that running generations may take at shutdown")
    redis_wait_s: float = setting(0.0, "seconds to wait at start for a Redis that is down")
    session_ttl_s: float = setting(3600.0, "seconds after its last use at which a session expires")
    max_sessions_per_key: int = setting(
        10_000, "maximum sessions of an API key that sets no limit (api_keys_file)"
    )
    log_level: str = setting("info", "debug, info, warning or error")
    log_json: bool = setting(False, "log JSON lines")

    def __post_init__(self) -> None:
        _require_listen_host(self.host)
        require_port(self.port)
        require(bool(self.target_endpoint), "target_endpoint", "is required: host:port")
        for endpoint in self.target_endpoints:
            require_endpoint(endpoint, "target_endpoint")
        for endpoint in self.draft_endpoints:
            require_endpoint(endpoint, "draft_endpoint")
        require(self.max_gamma >= 0, "max_gamma", "must be 0 or more")
        require(
            self.gamma is None or 0 <= self.gamma <= self.max_gamma,
            "gamma",
            f"must be 0 to max_gamma ({self.max_gamma})",
        )
        pool = self.prompt_lookup_pool
        require(pool == 0 or pool >= 16_384, "prompt_lookup_pool", "must be 0, or 16384 or more")
        wait_ms = self.draft_wait_ms
        require(wait_ms is None or wait_ms >= 0, "draft_wait_ms", "must be 0 or more")
        require(0 <= self.lookahead <= 4, "lookahead", "must be 0 to 4")
        require(1 <= self.fan_out <= 64, "fan_out", "must be 1 to 64")
        for name in ("session_ttl_s", "verify_timeout_s", "write_timeout_s"):
            require(getattr(self, name) > 0, name, "must be more than 0")
        for name in ("default_max_tokens", "max_generations", "max_sessions_per_key"):
            require(getattr(self, name) >= 1, name, "must be 1 or more")
        for name in ("connection_age_s", "connection_age_grace_s"):
            age_s = getattr(self, name)
            require(0 <= age_s <= MAX_AGE_S, name, f"must be from 0 to {MAX_AGE_S:.0f}")
        for name in ("max_waiting", "target_wait_s", "stop_grace_s", "redis_wait_s"):
            require(getattr(self, name) >= 0, name, "must be 0 or more")
        self.check_server()
        self.check_telemetry(has_http=self.http_port is not None)
        self.check_observation()
        self.check_draft_canary()
        self.check_tokenizer()
        self.redis_at(self.redis_url)  # raises where the settings do not fit it
        for name, values in _CHOICES:
            require(getattr(self, name) in values, name, f"must be {' or '.join(values)}")

    @property
    def redis(self) -> RedisAddress:
        return self.redis_at(self.redis_url)

    @property
    def target_endpoints(self) -> tuple[str, ...]:
        """Empty: the registry lists the target replicas."""
        return _endpoints(self.target_endpoint)

    @property
    def draft_endpoints(self) -> tuple[str, ...]:
        """Empty: the registry lists the draft replicas, or there are none."""
        return _endpoints(self.draft_endpoint or "")


# Longest age of a connection: gRPC counts milliseconds in 32 bits.
MAX_AGE_S = 2_000_000.0
_CHOICES = (
    ("durability", ("durable", "fast")),
    ("without_redis", ("refuse", "unrecorded")),
    ("draft_wait", ("adaptive", "always")),
)
REGISTRY = "registry"


def _require_listen_host(host: str) -> None:
    if host:  # empty: all interfaces
        require_host(host, "host")


def _endpoints(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if parts == (REGISTRY,) else parts
