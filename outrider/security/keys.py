"""API keys: creation, the file of their digests, and lookup.

A line of the file is `NAME sha256:DIGEST [LIMIT=N …]`, limits as in KeyLimits. `#` begins a
comment. The file has digests only, so reading it gives no access. A key has 256 random bits, so an
unsalted digest is enough. Keys in gRPC metadata are read by `orchestrator.admission.api_keys`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from outrider.errors import ConfigError
from outrider.security.files import WatchedFiles, read_file

_PREFIX = "outrider-"
_KEY_BYTES = 32
# Part of Redis keys, before the session's id.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
# Each call compares its key with all of them, at about 0.3 us each (measured).
MAX_KEYS = 4_096
_MAX_LIMIT = 10**15 - 1
_RANGES = {
    "streams": (1, _MAX_LIMIT),
    "tokens_per_minute": (1, _MAX_LIMIT),
    "sessions": (1, _MAX_LIMIT),
    "min_priority": (-(2**31), 2**31 - 1),
}
_NUMBER = re.compile(r"-?[0-9]{1,16}", re.ASCII)


@dataclass(frozen=True)
class KeyLimits:
    """Limits of an API key; None: unlimited.

    `sessions` None: the orchestrator's max_sessions_per_key. `min_priority`: lowest priority number
    that counts against other clients; None: 0.
    """

    streams: int | None = None
    tokens_per_minute: int | None = None
    sessions: int | None = None
    min_priority: int | None = None

    def __str__(self) -> str:
        limits = vars(self).items()
        return " ".join(f"{name}={value}" for name, value in limits if value is not None)


@dataclass(frozen=True)
class ApiKey:
    """Digest of a key and the limits of its client. Keys with the same name are one client's."""

    name: str
    digest: bytes = field(repr=False)
    limits: KeyLimits

    def __str__(self) -> str:
        """The line for the keys file."""
        return f"{self.name} sha256:{self.digest.hex()} {self.limits}".rstrip()


class KeyRing:
    """All API keys of a file."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRing) and self._keys == other._keys

    __hash__ = None  # type: ignore[assignment]

    def find(self, presented: str) -> ApiKey | None:
        """Finds the API key, in the same time for each `presented` key. None: it is unknown."""
        digest = _digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def new_key(name: str, limits: KeyLimits) -> tuple[str, ApiKey]:
    """Creates a key: the secret for the client, and its line for the file. Raises ConfigError."""
    _check_name(name)
    for label, value in vars(limits).items():
        least, most = _RANGES[label]
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{label}: {value} is not in [{least}, {most}]")
    secret = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return secret, ApiKey(name, _digest(secret), limits)


def check_key(key: str, setting: str) -> str:
    """Returns a key that gRPC metadata can carry. Raises ConfigError that names `setting`."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{setting}: not a key: must be one line of printable ASCII, no spaces")
    return key


def add_key(path: str, key: ApiKey) -> None:
    """Appends a line to the file, which may not exist yet.

    Raises ConfigError, without a change, if the file is invalid or would become so.
    """
    file = Path(path)
    try:
        text = file.read_text("utf-8") if file.exists() else ""
        added = f"{key}\n" if not text or text.endswith("\n") else f"\n{key}\n"
        _ring(text + added, path)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(added)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file: {path}: {error}") from None


def watched_keys(path: str) -> WatchedFiles[KeyRing]:
    """Keys of the file, reloaded when it changes. Raises ConfigError that names file and line."""
    return WatchedFiles([path], lambda: _read(path))


def _read(path: str) -> KeyRing:
    try:
        text = read_file(path, "api_keys_file").decode()
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys_file: {path} is not UTF-8 text") from None
    return _ring(text, path)


def _ring(text: str, path: str) -> KeyRing:
    keys: list[ApiKey] = []
    limits: dict[str, KeyLimits] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _parse(words)
            if limits.setdefault(key.name, key.limits) != key.limits:
                raise ConfigError(f"{key.name}: an earlier line has other limits")
        except ConfigError as error:
            raise ConfigError(f"api_keys_file: {path}, line {number}: {error}") from None
        keys.append(key)
    if not keys:
        raise ConfigError(f"api_keys_file: {path} has no keys; create one with: outrider keys new")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"api_keys_file: {path} has {len(keys)} keys; at most {MAX_KEYS}")
    return KeyRing(keys)


def _parse(words: list[str]) -> ApiKey:
    """Parses the words of a line. Errors do not contain them: one may be a key, by mistake."""
    name, *rest = words
    _check_name(name)
    digest = _DIGEST.fullmatch(rest[0]) if rest else None
    if digest is None:
        raise ConfigError(f"{name}: must be followed by sha256: and 64 hexadecimal digits")
    values: dict[str, int] = {}
    for word in rest[1:]:
        label, _, value = word.partition("=")
        if label not in _RANGES or label in values:
            allowed = ", ".join(f"{label}=N" for label in _RANGES)
            raise ConfigError(f"{name}: unknown or repeated limit; only {allowed}, each once")
        least, most = _RANGES[label]
        if not (_NUMBER.fullmatch(value) and least <= int(value) <= most):
            raise ConfigError(f"{name}: {label} must be an integer in [{least}, {most}]")
        values[label] = int(value)
    return ApiKey(name, bytes.fromhex(digest[1]), KeyLimits(**values))


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            "a name must be 1 to 63 characters of A-Z a-z 0-9 . _ - and begin with a letter or "
            "digit"
        )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
