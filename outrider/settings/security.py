"""The settings of who may talk to whom, for `outrider.settings.services` to take in. Reads no file.

Secrets are never settings: a setting names the file that holds one.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from outrider.settings.fields import require, require_port, setting
from outrider.settings.redis_address import RedisAddress, has_password, has_stray_login


@dataclass(frozen=True)
class RedisSettings:
    """How a program logs in at Redis; its address is the program's own setting."""

    redis_ca: str | None = setting(
        None, "PEM file: who signs Redis' certificate (rediss://); unset: the system's"
    )
    redis_cert: str | None = setting(None, "PEM file: the certificate shown to Redis, if it asks")
    redis_key: str | None = setting(None, "PEM file: its key")
    redis_user: str | None = setting(None, "user of Redis' ACL; unset: the default user")
    redis_password_file: str | None = setting(
        None, "file that holds Redis' password; read at each connection"
    )

    def redis_at(self, url: str) -> RedisAddress:
        """Raises ConfigError for settings that do not fit the URL."""
        require(
            not has_stray_login(url), "redis_url",
            "user and password stand before the host, percent-encoded (%2F for a /), or in "
            "redis_user and redis_password_file",
        )  # fmt: skip
        parts = urlsplit(url)
        for name in ("redis_ca", "redis_cert", "redis_key"):
            has_use = getattr(self, name) is None or parts.scheme == "rediss"
            require(has_use, name, "only with a redis_url of rediss://")
        _require_both(self, "redis_cert", "redis_key")
        has_secret = self.redis_password_file is not None or has_password(url)
        require(self.redis_user is None or has_secret, "redis_user", "needs redis_password_file")
        _require_alone(self.redis_user, bool(parts.username), "redis_user", "a user")
        _require_alone(
            self.redis_password_file, has_password(url), "redis_password_file", "a password"
        )
        return RedisAddress(
            url,
            ca=self.redis_ca,
            cert=self.redis_cert,
            key=self.redis_key,
            user=self.redis_user,
            password_file=self.redis_password_file,
        )


@dataclass(frozen=True)
class ServerSettings(RedisSettings):
    """How callers reach a program."""

    tls_cert: str | None = setting(None, "PEM file: the server's certificate chain; unset: no TLS")
    tls_key: str | None = setting(None, "PEM file: its key; both are read anew when they change")
    tls_client_ca: str | None = setting(
        None, "PEM file: callers must show a certificate signed by this"
    )
    health_port: int | None = setting(
        None, "a second port, without TLS, with nothing but health; unset: none; 0: a free one"
    )

    def check_server(self) -> None:
        """Raises ConfigError."""
        _require_both(self, "tls_cert", "tls_key")
        has_use = self.tls_client_ca is None or self.tls_cert is not None
        require(has_use, "tls_client_ca", "needs tls_cert and tls_key")
        if self.health_port is not None:
            require_port(self.health_port, "health_port")


DEFAULT_CLIENT_NAMES = "orchestrator"


@dataclass(frozen=True)
class TierSettings(ServerSettings):
    """How orchestrators reach a model service."""

    tls_client_names: str = setting(
        DEFAULT_CLIENT_NAMES,
        "DNS names, with commas between; the caller's certificate must have one (tls_client_ca)",
    )

    def check_server(self) -> None:
        super().check_server()
        require(bool(self.client_names), "tls_client_names", "names nobody")
        has_use = self.tls_client_names == DEFAULT_CLIENT_NAMES or self.tls_client_ca is not None
        require(has_use, "tls_client_names", "needs tls_client_ca")

    @property
    def client_names(self) -> frozenset[str]:
        return frozenset(part.strip() for part in self.tls_client_names.split(",") if part.strip())


@dataclass(frozen=True)
class OrchestratorSettings(ServerSettings):
    """How callers reach the orchestrator, and how it reaches the tiers."""

    api_keys_file: str | None = setting(
        None, "file of callers' keys, as digests (outrider keys new); unset: anyone may call"
    )
    tier_tls_ca: str | None = setting(
        None, "PEM file: who signs the tiers' certificates; unset: no TLS to the tiers"
    )
    tier_tls_cert: str | None = setting(None, "PEM file: the certificate shown to the tiers")
    tier_tls_key: str | None = setting(None, "PEM file: its key")
    tier_tls_name: str | None = setting(
        None, "DNS name in the tiers' certificates; unset: the host of their endpoint"
    )

    def check_server(self) -> None:
        super().check_server()
        _require_both(self, "tier_tls_cert", "tier_tls_key")
        for name in ("tier_tls_cert", "tier_tls_name"):
            has_use = getattr(self, name) is None or self.tier_tls_ca is not None
            require(has_use, name, "needs tier_tls_ca")


def _require_both(settings: object, first: str, second: str) -> None:
    has_first, has_second = (getattr(settings, name) is not None for name in (first, second))
    require(has_first or not has_second, first, f"is required with {second}")
    require(has_second or not has_first, second, f"is required with {first}")


def _require_alone(value: str | None, is_in_url: bool, name: str, what: str) -> None:
    require(value is None or not is_in_url, name, f"not together with {what} in redis_url")
