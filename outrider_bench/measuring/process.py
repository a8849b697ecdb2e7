"""What another process has used, as Linux counts it. Starts nothing."""

from __future__ import annotations

import time
from pathlib import Path

from outrider.errors import ConfigError

_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """Of all its threads, to the nanosecond: the clock that clock_getcpuclockid(3) names.

    /proc/PID/stat counts in ticks of 10 ms, too coarse for windows of 100. Raises ConfigError
    where there is no such clock.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError as error:
        raise ConfigError(f"process {pid}: its CPU time cannot be read: {error}") from error


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident now, and at most so far. Raises ConfigError without /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise ConfigError(f"process {pid}: its memory cannot be read: {error}") from error
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return _bytes(fields["VmRSS"]), _bytes(fields["VmHWM"])


def _bytes(kibibytes: str) -> int:
    return int(kibibytes.split()[0]) * 1024
