"""One program of the system under test: can be killed, frozen, stopped and restarted.

Owns the process, and points the links to it at its current address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from outrider.cli.relay import Relay
from outrider.cli.supervisor import STOP_GRACE_S, Program
from outrider.errors import Unavailable

# Time limit of a start: loads torch and a model on a busy machine.
START_TIMEOUT_S = 120.0

# Program that keeps a process frozen until its standard input ends. That happens even if this
# process is killed.
_FREEZER = """
import os, signal, sys
pid = int(sys.argv[1])
os.kill(pid, signal.SIGSTOP)
try:
    print("frozen", flush=True)
    sys.stdin.read()
finally:
    os.kill(pid, signal.SIGCONT)
"""


class Node:
    """One program. `links` lead to it. `on_death` is called with the reason when it exits by
    itself.

    Call `start` on the event loop of the main thread (`outrider.runtime.child_process`).
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_dir: Path,
        links: Sequence[Relay],
        on_death: Callable[[str], None],
    ) -> None:
        """`arguments`: those of `python -m`."""
        self.name = name
        # host:port of the process itself, not of a link. Valid while it runs.
        self.address = ""
        self._arguments = list(arguments)
        self._log_dir = log_dir
        self._links = links
        self._on_death = on_death
        self._program: Program | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id; valid while it runs."""
        assert self._program is not None, "it runs"
        return self._program.process.pid

    async def start(self) -> None:
        """Starts the program; returns when it serves. Raises ProgramFailed, Unavailable."""
        assert self._program is None, "it runs"
        self._program = await Program.start(self.name, self._arguments, self._log_dir)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.address = await self._program.listening()
        except TimeoutError:
            message = f"{self.name} is not serving after {START_TIMEOUT_S:g} s"
            raise Unavailable(message) from None
        host, _, port = self.address.rpartition(":")
        for link in self._links:
            link.retarget(host, int(port))
        self._watch = asyncio.create_task(
            self._watch_exit(self._program), name=f"{self.name} watch"
        )

    async def kill(self) -> None:
        """Sends SIGKILL; returns when the process has exited."""
        program = await self._stop_watching()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            program.kill()
        await program.process.wait()
        self._program = None

    async def stop(self) -> int:
        """Sends SIGTERM; returns the exit status. It is SIGKILL's if the exit took too long."""
        program = await self._stop_watching()
        await program.stop()
        self._program = None
        status = program.process.returncode
        assert status is not None, "it has ended"
        return status

    @contextlib.asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """SIGSTOP for the time of a block, and no longer than this process lives."""
        assert self._program is not None, "it runs"
        async with frozen(self._program.process.pid):
            yield

    async def close(self) -> None:
        """Kills the process, whatever its state."""
        if self._program is not None:
            await self.kill()

    async def _stop_watching(self) -> Program:
        assert self._program is not None, "it runs"
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return self._program

    async def _watch_exit(self, program: Program) -> None:
        self._on_death(str(await program.death()))


@contextlib.asynccontextmanager
async def frozen(pid: int) -> AsyncIterator[None]:
    """Freezes a child process for the time of a block. It also resumes if we are killed."""
    freezer = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _FREEZER, str(pid),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the process may have exited by SIGCONT
        start_new_session=True,  # not reached by Ctrl-C
    )  # fmt: skip
    to_freezer, from_freezer = freezer.stdin, freezer.stdout
    assert to_freezer is not None, "it is a pipe"
    assert from_freezer is not None, "it is a pipe"
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await from_freezer.readline()
        yield
    finally:
        to_freezer.close()
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await freezer.wait()
        except (TimeoutError, asyncio.CancelledError):
            freezer.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            await freezer.wait()
            raise
