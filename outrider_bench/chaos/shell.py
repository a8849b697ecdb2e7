"""Faults of the user's own on a system of the user's own: shell commands, one every so often.

What they do is not known here; so every fault of the system's may have been theirs. Owns the
commands' processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence

from outrider_bench.chaos.client import Stream
from outrider_bench.chaos.faults import Fault, Tier
from outrider_bench.chaos.inject import Occurrence

# Of one command: it may wait for what it has begun.
_TIMEOUT_S = 120.0


class ShellFaults:
    """As `outrider_bench.chaos.run.Faults`; the schedule it is given means nothing."""

    def __init__(self, commands: Sequence[str], every_s: float) -> None:
        self.occurrences: list[Occurrence[Stream]] = []
        # Commands that failed, or did not end in time.
        self.failures: list[str] = []
        self._commands = commands
        self._every_s = every_s
        self._is_ending = asyncio.Event()

    async def run(self, faults: Iterator[Fault]) -> None:
        """In turn, until `end`."""
        for command in itertools.cycle(self._commands):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._is_ending.wait()
            if self._is_ending.is_set():
                return
            self.occurrences.append(Occurrence(command, time.monotonic()))
            await self._execute(command)

    def end(self) -> None:
        """No command is begun any more."""
        self._is_ending.set()

    def happened(self, tier: Tier, replica: int, since: float) -> bool:
        """Always: whoever runs this breaks what they like."""
        return True

    async def _execute(self, command: str) -> None:
        starting = asyncio.create_task(
            asyncio.create_subprocess_shell(
                command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        )
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                process = await asyncio.shield(starting)
                status = await process.wait()
            if status:
                self.failures.append(f"{command}: exit status {status}")
        except TimeoutError:
            self.failures.append(f"{command}: not over after {_TIMEOUT_S:g} s")
        finally:
            # Cancelled in the midst of the start, too: asyncio would end the shell alone.
            process = await starting
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
