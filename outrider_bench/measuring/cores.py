"""CPU layouts: the cores each program is pinned to during a measurement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from outrider.errors import ConfigError


class CoreUse(StrEnum):
    """Values of `--cores`."""

    pinned = "pinned"
    shared = "shared"


@dataclass(frozen=True)
class CoreLayout:
    """Cores of each program, in the format of `StackOptions`. None: any core.

    `bench` is for Redis and this process.
    """

    target: str | None = None
    draft: str | None = None
    orchestrator: str | None = None
    bench: str | None = None

    @contextlib.contextmanager
    def pins_this_process(self) -> Iterator[None]:
        """Pins this process to `bench` inside the block; restores the previous cores after it.

        Child processes started inside the block inherit the pinning unless they have own cores.
        """
        if self.bench is None:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {int(self.bench)})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def core_per_tier(use: CoreUse) -> CoreLayout:
    """Layout with one core for the target and one for the draft; all other programs share the rest.

    With only two cores, the other programs share the draft's core, which is idle most of the time.
    Raises ConfigError.
    """
    if use is CoreUse.shared:
        return CoreLayout()
    cores = _own_cores()
    third = cores[2] if len(cores) > 2 else cores[1]
    return CoreLayout(cores[0], cores[1], third, cores[3] if len(cores) > 3 else third)


def core_for_orchestrator(use: CoreUse) -> CoreLayout:
    """Layout with one core for the orchestrator alone, for benchmarks that measure it.

    Raises ConfigError.
    """
    if use is CoreUse.shared:
        return CoreLayout()
    cores = _own_cores()
    spare = cores[2] if len(cores) > 2 else cores[0]
    return CoreLayout(cores[0], cores[0], cores[1], spare)


def _own_cores() -> list[str]:
    """Cores of this process. Raises ConfigError if there are fewer than two."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--cores: this system cannot pin processes to cores; use --cores shared")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    if len(cores) < 2:
        raise ConfigError("--cores: pinned needs two cores, here is one; use --cores shared")
    return cores
