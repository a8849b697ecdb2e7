"""Callers' keys: how one is made, the file that holds their digests, whose a key is.

A line of the file is `NAME sha256:DIGEST [LIMIT=N …]`, limits as in KeyLimits. `#` begins a
comment. The file holds no key, so that who reads it can call nothing. A key is 256 random bits: a
plain digest is enough, there is nothing to guess. Knows no transport.
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
# It stands in Redis' keys before the session's id.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
# All are looked through at each call: some 0.3 us each (measured).
MAX_KEYS = 4_096
_MOST = 10**15 - 1
_RANGES = {
    "streams": (1, _MOST),
    "tokens_per_minute": (1, _MOST),
    "sessions": (1, _MOST),
    "min_priority": (-(2**31), 2**31 - 1),
}
_NUMBER = re.compile(r"-?[0-9]{1,16}", re.ASCII)


@dataclass(frozen=True)
class KeyLimits:
    """What a caller may use at a time; None: as much as there is.

    `sessions` None: the orchestrator's max_sessions_per_key. `min_priority`: the lowest priority
    number that counts against other callers; None: 0.
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
    """Lines of one name are one caller, for instance while a new key takes an old one's place."""

    name: str
    digest: bytes = field(repr=False)
    limits: KeyLimits

    def __str__(self) -> str:
        """As a line of the file."""
        return f"{self.name} sha256:{self.digest.hex()} {self.limits}".rstrip()


class KeyRing:
    """All keys that are known."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyRing) and self._keys == other._keys

    __hash__ = None  # type: ignore[assignment]

    def find(self, presented: str) -> ApiKey | None:
        """Whose key it is. Takes the same time whatever is presented."""
        digest = _digest(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def limits_of(self, name: str) -> KeyLimits | None:
        """None: nobody is called so (any more)."""
        return next((key.limits for key in self._keys if key.name == name), None)


def new_key(name: str, limits: KeyLimits) -> tuple[str, ApiKey]:
    """A key for the caller to keep, and its line for the file. Raises ConfigError."""
    _check_name(name)
    for label, value in vars(limits).items():
        least, most = _RANGES[label]
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{label}: {value}: a number from {least} to {most}")
    secret = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return secret, ApiKey(name, _digest(secret), limits)


def check_key(key: str, setting: str) -> str:
    """One that can go with a call. Raises ConfigError naming where it comes from."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{setting}: no key: printable ASCII without spaces, in one line")
    return key


def add_key(path: str, key: ApiKey) -> None:
    """A line more, in a file that may not be there yet. Raises ConfigError, and changes nothing."""
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
    """The file's keys, read anew when it changes. Raises ConfigError naming file and line."""
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
                raise ConfigError(f"{key.name} has other limits in an earlier line")
        except ConfigError as error:
            raise ConfigError(f"api_keys_file: {path}, line {number}: {error}") from None
        keys.append(key)
    if not keys:
        raise ConfigError(f"api_keys_file: {path} has no keys; make one with: outrider keys new")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"api_keys_file: {path} has {len(keys)} keys; at most {MAX_KEYS}")
    return KeyRing(keys)


def _parse(words: list[str]) -> ApiKey:
    """Never says what it was given: it may be a key, by mistake."""
    name, *rest = words
    _check_name(name)
    digest = _DIGEST.fullmatch(rest[0]) if rest else None
    if digest is None:
        raise ConfigError(f"{name}: sha256: and 64 hexadecimal digits must follow")
    values: dict[str, int] = {}
    for word in rest[1:]:
        label, _, value = word.partition("=")
        if label not in _RANGES or label in values:
            allowed = ", ".join(f"{label}=N" for label in _RANGES)
            raise ConfigError(f"{name}: only {allowed} may follow, each once")
        least, most = _RANGES[label]
        if not (_NUMBER.fullmatch(value) and least <= int(value) <= most):
            raise ConfigError(f"{name}: {label} must be a number from {least} to {most}")
        values[label] = int(value)
    return ApiKey(name, bytes.fromhex(digest[1]), KeyLimits(**values))


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            "a name is 1 to 63 characters of A-Z a-z 0-9 . _ -, a letter or digit first"
        )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()
