"""Redis address and login as plain data; `outrider.redis.connection` connects."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, urlsplit

from outrider.errors import ConfigError


@dataclass(frozen=True)
class RedisAddress:
    """Redis URL with login.

    `url`: redis://, rediss:// (TLS) or unix://. `ca`, `cert`, `key`: paths of PEM files.
    `password_file`: read at each connection, so that a new password needs no restart.
    """

    url: str
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password_file: str | None = None

    def __str__(self) -> str:
        """The URL without user and password."""
        return shown(self.url)

    def __repr__(self) -> str:
        return f"RedisAddress({self})"


def shown(url: str) -> str:
    """The URL without user and password, wherever these are in it."""
    parts = _parts(url)
    if parts.scheme == "unix":
        return f"unix://{parts.netloc.rpartition('@')[2]}{parts.path}"
    # urlsplit ends the host at the slash of an unencoded password.
    return f"{parts.scheme}://{url.partition('://')[2].rpartition('@')[2].partition('?')[0]}"


def has_password(url: str) -> bool:
    """Whether the URL contains a password: such a URL must not be on a command line."""
    return bool(_parts(url).password) or has_stray_login(url)


def has_stray_login(url: str) -> bool:
    """Whether a user or password is in an unusual place of the URL, where it would be logged."""
    parts = _parts(url)
    if parse_qs(parts.query).keys() & {"username", "password"}:
        return True
    return parts.scheme != "unix" and "@" in f"{parts.path}{parts.query}{parts.fragment}"


def _parts(url: str) -> SplitResult:
    """Raises ConfigError without the URL, any part of which may be the password."""
    try:
        return urlsplit(url)
    except ValueError:
        raise ConfigError("redis_url: not a URL such as redis://HOST:6379/0") from None
