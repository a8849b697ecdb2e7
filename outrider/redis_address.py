"""Where Redis is and how one logs in there, as plain data. Connects to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


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
    """A URL without user and password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def has_password(url: str) -> bool:
    """Whether the URL carries a secret: it is then not for a command line."""
    return bool(urlsplit(url).password)
