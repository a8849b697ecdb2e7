"""Faults by the user's shell commands, on the user's system. Owns the commands' processes.

Their effect is unknown: every failure that a fault may explain is accepted.
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

# Time limit of a command: it may wait for what it has started.
_TIMEOUT_S = 120.0


class ShellFaults:
    """Implements `outrider_bench.chaos.run.FaultSource`; ignores the schedule."""

    def __init__(self, commands: Sequence[str], every_s: float) -> None:
        self.occurrences: list[Occurrence[Stream]] = []
        # Commands that failed or timed out.
        self.failures: list[str] = []
        self._commands = commands
        self._every_s = every_s
        self._is_stopping = asyncio.Event()

    async def run(self, faults: Iterator[Fault]) -> None:
        """Runs the commands in turn until `stop`."""
        for command in itertools.cycle(self._commands):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._is_stopping.wait()
            if self._is_stopping.is_set():
                return
            self.occurrences.append(Occurrence(command, time.monotonic()))
            await self._execute(command)

    def stop(self) -> None:
        """Starts no further command."""
        self._is_stopping.set()

    def was_faulted(self, tier: Tier, replica: int, since: float) -> bool:
        """Always true: the effect of the commands is unknown."""
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
            self.failures.append(f"{command}: not finished after {_TIMEOUT_S:g} s")
        finally:
            # Also if cancelled during the start. asyncio would kill the shell only.
            process = await starting
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
