"""Watched files: their parsed content, reloaded when they change, never from half a change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from outrider.errors import ConfigError

# Much shorter than Kubernetes needs to update a Secret in a pod: up to a minute.
POLL_INTERVAL_S = 1.0
_MAX_BYTES = 4 * 1024 * 1024

Content = TypeVar("Content")
# Modification time, size and inode, of the link's target: Kubernetes replaces a link to a folder.
_Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[Content]):
    """Parsed content of files. `current`: the last valid content. Any thread may call `refresh`."""

    def __init__(self, paths: Sequence[str], read: Callable[[], Content]) -> None:
        """Reads at once. `read` raises ConfigError that names the setting; so does this."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._refused: _Stamp = ()
        self._stamp = self._stat()
        self.current = read()

    def refresh(self) -> bool:
        """Whether the content has changed. Invalid files are logged once and change nothing.

        Never raises.
        """
        import structlog  # not by clients, which read files once

        log = structlog.get_logger()
        with self._lock:
            stamp = self._stat()
            if stamp in (self._stamp, self._refused):
                return False
            try:
                content = self._read()
            except ConfigError as error:
                self._refused = stamp
                log.error("files_refused", why=str(error), until="they change again")
                return False
            if self._stat() != stamp:  # changed while reading: the next refresh reads it whole
                return False
            self._stamp, self._refused = stamp, ()
            is_new = content != self.current
            self.current = content
        if is_new:
            log.info("files_reloaded", paths=list(self._paths))
        return is_new

    async def follow(self, on_change: Callable[[], None] = lambda: None) -> None:
        """Refreshes once a second and calls `on_change` on the event loop, until cancelled."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            if await asyncio.to_thread(self.refresh):
                on_change()

    def _stat(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def read_file(path: str, setting: str) -> bytes:
    """Content of a file. Raises ConfigError that names the setting, without the content."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror or error}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{setting}: {path} is larger than {_MAX_BYTES} bytes")
    return content


def read_secret(path: str, setting: str) -> str:
    """Content of a file with one secret, without surrounding whitespace. Raises ConfigError."""
    try:
        secret = read_file(path, setting).decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: {path} is not UTF-8 text") from None
    if not secret:
        raise ConfigError(f"{setting}: {path} is empty")
    return secret


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = Path(path).stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
