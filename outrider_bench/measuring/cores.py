"""Which core belongs to which program while something is measured. Starts nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from outrider.errors import ConfigError


class CoreUse(StrEnum):
    pinned = "pinned"
    shared = "shared"


@dataclass(frozen=True)
class CoreLayout:
    """Cores as `StackOptions` takes them; None: any. `bench`: Redis and this process."""

    target: str | None = None
    draft: str | None = None
    orchestrator: str | None = None
    bench: str | None = None

    @contextlib.contextmanager
    def pins_this_process(self) -> Iterator[None]:
        """And all that it starts meanwhile without cores of its own."""
        if self.bench is None:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {int(self.bench)})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def apart(use: CoreUse) -> CoreLayout:
    """A core for the target and one for the draft, two machines in miniature; the rest share.

    The rest have the draft's core where there are only two: it has time to spare.
    """
    if use is CoreUse.shared:
        return CoreLayout()
    cores = _own_cores()
    third = cores[2] if len(cores) > 2 else cores[1]
    return CoreLayout(cores[0], cores[1], third, cores[3] if len(cores) > 3 else third)


def orchestrator_apart(use: CoreUse) -> CoreLayout:
    """A core for the orchestrator alone, where it is what is measured."""
    if use is CoreUse.shared:
        return CoreLayout()
    cores = _own_cores()
    spare = cores[2] if len(cores) > 2 else cores[0]
    return CoreLayout(cores[0], cores[0], cores[1], spare)


def _own_cores() -> list[str]:
    """At least two. Raises ConfigError."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--cores: this system cannot pin a process; use --cores shared")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    if len(cores) < 2:
        raise ConfigError("--cores: pinned takes two cores, here is one; use --cores shared")
    return cores
