"""Files of recorded traffic: appended to, rotated, and deleted by age and total size.

Several orchestrators may share a directory: each writes files of its own, and all delete the oldest
files of all. Blocking: used in a thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import ConfigError

_PATTERN = "traffic-*.jsonl"
# A directory has at least this many files before the oldest is deleted for size.
_FILES_PER_LIMIT = 16
# The oldest record of a file is at most this much older than the file's last write.
_MAX_FILE_AGE_S = 3600.0


@dataclass(frozen=True)
class Retention:
    """Limits of the directory: total bytes, and seconds since a file's last write."""

    max_bytes: int
    max_age_s: float


class TrafficFiles:
    """Appends lines to files in a directory. Raises ConfigError if it cannot be written."""

    def __init__(self, directory: Path, retention: Retention) -> None:
        self._directory = directory
        self._retention = retention
        self._path: Path | None = None
        self._num_bytes = 0
        self._opened_at = 0.0
        self._number = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_writable = os.access(directory, os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(f"traffic_dir: {directory}: {error.strerror or error}") from error
        if not is_writable:
            raise ConfigError(f"traffic_dir: {directory} is not writable")

    def append(self, lines: Sequence[str]) -> None:
        """Writes whole lines. Raises OSError: none of them, or the first of them, were written."""
        data = "".join(lines).encode("ascii")
        descriptor = os.open(self._current(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
        self._num_bytes += len(data)
        self.delete_old()

    def _current(self) -> Path:
        """The file to append to: a new one when the last is large or an hour old."""
        now = time.time()
        is_full = self._num_bytes >= self._retention.max_bytes // _FILES_PER_LIMIT
        if self._path is None or is_full or now - self._opened_at > _MAX_FILE_AGE_S:
            self._number += 1
            began_at = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
            name = f"traffic-{began_at}-{socket.gethostname()}-{os.getpid()}-{self._number}.jsonl"
            self._path, self._num_bytes, self._opened_at = self._directory / name, 0, now
        return self._path

    def delete_old(self) -> None:
        """Deletes files beyond the retention, the oldest first."""
        found = []
        for path in self._directory.glob(_PATTERN):
            with contextlib.suppress(FileNotFoundError):  # another orchestrator deleted it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        num_bytes = sum(size for _, size, _ in found)
        for modified_at, size, path in sorted(found):
            is_old = time.time() - modified_at > self._retention.max_age_s
            if not is_old and num_bytes <= self._retention.max_bytes:
                return
            path.unlink(missing_ok=True)
            num_bytes -= size
