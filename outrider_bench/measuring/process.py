"""CPU time and memory of another process, as counted by Linux."""

from __future__ import annotations

import time
from pathlib import Path

from outrider.errors import ConfigError

_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process, from the clock of clock_getcpuclockid(3).

    Resolution is a nanosecond. /proc/PID/stat counts in ticks of 10 ms, too coarse for windows of
    100 ms. Raises ConfigError if the process or the clock does not exist.
    """
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError as error:
        raise ConfigError(f"process {pid}: cannot read its CPU time: {error}") from error


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident memory now, and its peak so far. Raises ConfigError if /proc/PID is missing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise ConfigError(f"process {pid}: cannot read its memory: {error}") from error
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return _bytes(fields["VmRSS"]), _bytes(fields["VmHWM"])


def _bytes(kibibytes: str) -> int:
    return int(kibibytes.split()[0]) * 1024
