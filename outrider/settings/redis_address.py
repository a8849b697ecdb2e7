"""Where Redis is and how one logs in there, as plain data. Connects to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, urlsplit

from outrider.errors import ConfigError


@dataclass(frozen=True)
class RedisAddress:
    """`url`: redis://, rediss:// (TLS) or unix://. The rest are files' paths and a user's name.

    The password file is read at each connection: a new password needs no restart.
    """

    url: str
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password_file: str | None = None

    def __str__(self) -> str:
        """As it may be shown: without user and password."""
        return shown(self.url)

    def __repr__(self) -> str:
        return f"RedisAddress({self})"


def shown(url: str) -> str:
    """A URL without user and password, wherever they stand in it."""
    parts = _parts(url)
    if parts.scheme == "unix":
        return f"unix://{parts.netloc.rpartition('@')[2]}{parts.path}"
    # A password with a slash in it ends what a URL's parts call the host.
    return f"{parts.scheme}://{url.partition('://')[2].rpartition('@')[2].partition('?')[0]}"


def has_password(url: str) -> bool:
    """Whether the URL carries a secret: it is then not for a command line."""
    return bool(_parts(url).password) or has_stray_login(url)


def has_stray_login(url: str) -> bool:
    """Whether a user or password stands where none is looked for, and would be told."""
    parts = _parts(url)
    if parse_qs(parts.query).keys() & {"username", "password"}:
        return True
    return parts.scheme != "unix" and "@" in f"{parts.path}{parts.query}{parts.fragment}"


def _parts(url: str) -> SplitResult:
    """Raises ConfigError, which does not say the URL: nobody knows what is what in it."""
    try:
        return urlsplit(url)
    except ValueError:
        raise ConfigError("redis_url: no URL such as redis://HOST:6379/0") from None
