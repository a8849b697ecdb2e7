"""Security settings: TLS, API keys and the login at Redis; base classes for `services`.

No setting holds a secret, apart from the password in a Redis URL: settings name the files of
secrets. No file is read here (`outrider.security` does that).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from outrider.settings.addresses import require_url_host
from outrider.settings.fields import require, require_port, setting
from outrider.settings.http import HttpSettings
from outrider.settings.redis_address import RedisAddress, has_password, has_stray_login

_MAX_URLS = 16
# A password may contain commas.
_BETWEEN_URLS = re.compile(r",(?=\s*[a-z]+://)")


@dataclass(frozen=True)
class RedisSettings:
    """Login at Redis. Each program has a `redis_url` of its own."""

    redis_ca: str | None = setting(
        None, "PEM file: CA of Redis' certificate (rediss://); unset: the system's CAs"
    )
    redis_cert: str | None = setting(
        None, "PEM file: client certificate for Redis, if it requires one"
    )
    redis_key: str | None = setting(None, "PEM file: private key of redis_cert")
    redis_user: str | None = setting(None, "Redis ACL user; unset: the default user")
    redis_password_file: str | None = setting(
        None, "file with Redis' password; read at each connection"
    )

    def redis_each(self, urls: str) -> tuple[RedisAddress, ...]:
        """The addresses of comma-separated URLs, as `redis_at`."""
        found = tuple(self.redis_at(url.strip()) for url in _BETWEEN_URLS.split(urls))
        require(len(found) <= _MAX_URLS, "redis_url", f"{len(found)} URLs; at most {_MAX_URLS}")
        return found

    def redis_at(self, url: str) -> RedisAddress:
        """The address with the login. Raises ConfigError for settings that do not fit the URL."""
        require(
            not has_stray_login(url), "redis_url",
            "put user and password before the host, percent-encoded (%2F for a /), or in "
            "redis_user and redis_password_file",
        )  # fmt: skip
        require_url_host(url, "redis_url")
        parts = urlsplit(url)
        database = parts.path.strip("/")
        require(
            parts.scheme == "unix" or not database or database.isdecimal(), "redis_url",
            "the part after the last / must be the number of a database, for instance 0",
        )  # fmt: skip
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
    """How clients reach a program: TLS, and a separate port for health checks."""

    tls_cert: str | None = setting(None, "PEM file: the server's certificate chain; unset: no TLS")
    tls_key: str | None = setting(
        None, "PEM file: private key of tls_cert; both are reloaded when they change"
    )
    tls_client_ca: str | None = setting(
        None, "PEM file: CA that must have signed the clients' certificates; unset: none required"
    )
    health_port: int | None = setting(
        None, "second port, without TLS, for health checks only; 0 picks a free one; unset: none"
    )

    def check_server(self) -> None:
        """Checks these settings. Raises ConfigError."""
        _require_both(self, "tls_cert", "tls_key")
        has_use = self.tls_client_ca is None or self.tls_cert is not None
        require(has_use, "tls_client_ca", "needs tls_cert and tls_key")
        if self.health_port is not None:
            require_port(self.health_port, "health_port")


DEFAULT_CLIENT_NAMES = "orchestrator"


@dataclass(frozen=True)
class TierSettings(ServerSettings):
    """How orchestrators reach a model service: which client certificates are accepted."""

    tls_client_names: str = setting(
        DEFAULT_CLIENT_NAMES,
        "comma-separated DNS names; the client's certificate must have one (with tls_client_ca)",
    )

    def check_server(self) -> None:
        super().check_server()
        require(bool(self.client_names), "tls_client_names", "is empty; give at least one DNS name")
        has_use = self.tls_client_names == DEFAULT_CLIENT_NAMES or self.tls_client_ca is not None
        require(has_use, "tls_client_names", "needs tls_client_ca")

    @property
    def client_names(self) -> frozenset[str]:
        return frozenset(part.strip() for part in self.tls_client_names.split(",") if part.strip())


@dataclass(frozen=True)
class OrchestratorSettings(ServerSettings, HttpSettings):
    """How clients reach the orchestrator, and how it reaches the target and draft tiers."""

    api_keys_file: str | None = setting(
        None, "file of API keys, as digests (outrider keys new); unset: no key is required"
    )
    tier_tls_ca: str | None = setting(
        None, "PEM file: CA of the replicas' certificates; unset: no TLS to the replicas"
    )
    tier_tls_cert: str | None = setting(None, "PEM file: client certificate for the replicas")
    tier_tls_key: str | None = setting(None, "PEM file: private key of tier_tls_cert")
    tier_tls_name: str | None = setting(
        None, "DNS name in the replicas' certificates; unset: the host of their endpoint"
    )

    def check_server(self) -> None:
        super().check_server()
        self.check_http()
        _require_both(self, "tier_tls_cert", "tier_tls_key")
        for name in ("tier_tls_cert", "tier_tls_name"):
            has_use = getattr(self, name) is None or self.tier_tls_ca is not None
            require(has_use, name, "needs tier_tls_ca")


def _require_both(settings: object, first: str, second: str) -> None:
    has_first, has_second = (getattr(settings, name) is not None for name in (first, second))
    require(has_first or not has_second, first, f"is required with {second}")
    require(has_second or not has_first, second, f"is required with {first}")


def _require_alone(value: str | None, is_in_url: bool, name: str, what: str) -> None:
    require(value is None or not is_in_url, name, f"cannot be combined with {what} in redis_url")
