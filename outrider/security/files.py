"""What some files say together, read anew when they change.

Owns when to read, and that half a change is never used. Knows nothing of what is in the files.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from outrider.errors import ConfigError

log = structlog.get_logger()

# Kubernetes itself takes up to a minute to bring a changed Secret to a pod.
POLL_INTERVAL_S = 1.0
_MAX_BYTES = 4 * 1024 * 1024

Content = TypeVar("Content")
# Time of change, size and inode, through links: Kubernetes swaps a link to a whole new folder.
_Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles(Generic[Content]):
    """`current` is what was read last and made sense. Any thread may call `refresh`."""

    def __init__(self, paths: Sequence[str], read: Callable[[], Content]) -> None:
        """Reads at once. `read` raises ConfigError, which names the setting; so does this."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._refused: _Stamp = ()
        self._stamp = self._look()
        self.current = read()

    def refresh(self) -> bool:
        """Whether there is something new. What cannot be read or makes no sense is said once, and
        what was read before it holds. Never raises."""
        with self._lock:
            stamp = self._look()
            if stamp in (self._stamp, self._refused):
                return False
            try:
                content = self._read()
            except ConfigError as error:
                self._refused = stamp
                log.error("files_refused", why=str(error), until="they change again")
                return False
            if self._look() != stamp:  # in the midst of a change: what comes next is whole
                return False
            self._stamp, self._refused = stamp, ()
            is_new = content != self.current
            self.current = content
        if is_new:
            log.info("files_reloaded", paths=list(self._paths))
        return is_new

    async def follow(self, on_change: Callable[[], None] = lambda: None) -> None:
        """Refreshes again and again, calling `on_change` on the loop; ends by cancellation."""
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            if await asyncio.to_thread(self.refresh):
                on_change()

    def _look(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def read_file(path: str, setting: str) -> bytes:
    """Raises ConfigError naming the setting; never says what is in the file."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror or error}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{setting}: {path} is larger than {_MAX_BYTES} bytes")
    return content


def read_secret(path: str, setting: str) -> str:
    """A file that holds one word, without the line's end. Raises ConfigError."""
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
