"""One program of a system under faults: it is killed, frozen, stopped, and comes back.

Owns the process and leads its links to wherever it listens. Knows no schedule.
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

# Loading torch and a model on a busy machine.
START_TIMEOUT_S = 120.0

# A frozen process cannot be told that we are gone; whoever holds it frozen is, by the end of its
# standard input.
_KEEP_FROZEN = """
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
    """`links` lead to it. `on_death` is told when it ends by itself, and why.

    `start` is for the event loop of the main thread (`outrider.runtime.child_process`).
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log_dir: Path,
        links: Sequence[Relay],
        on_death: Callable[[str], None],
    ) -> None:
        """`arguments`: of `python -m`."""
        self.name = name
        # host:port of the process itself, not of a link; while it lives.
        self.address = ""
        self._arguments = list(arguments)
        self._log_dir = log_dir
        self._links = links
        self._on_death = on_death
        self._program: Program | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """While it runs."""
        assert self._program is not None, "it runs"
        return self._program.process.pid

    async def start(self) -> None:
        """Returns when it serves. Raises ProgramFailed, Unavailable."""
        assert self._program is None, "it runs"
        self._program = await Program.start(self.name, self._arguments, self._log_dir)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.address = await self._program.listening()
        except TimeoutError:
            why = f"{self.name} does not serve after {START_TIMEOUT_S:g} s"
            raise Unavailable(why) from None
        host, _, port = self.address.rpartition(":")
        for link in self._links:
            link.retarget(host, int(port))
        self._watch = asyncio.create_task(self._watched(self._program), name=f"{self.name} watch")

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        program = await self._unwatched()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            program.kill()
        await program.process.wait()
        self._program = None

    async def stop(self) -> int:
        """SIGTERM; its exit status, when it is gone: that of SIGKILL where it took too long."""
        program = await self._unwatched()
        await program.stop()
        self._program = None
        status = program.process.returncode
        assert status is not None, "it has ended"
        return status

    @contextlib.asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """SIGSTOP for the time of a block, at most as long as this process lives."""
        assert self._program is not None, "it runs"
        async with frozen(self._program.process.pid):
            yield

    async def close(self) -> None:
        """Leaves no process, whatever state it is in."""
        if self._program is not None:
            await self.kill()

    async def _unwatched(self) -> Program:
        assert self._program is not None, "it runs"
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return self._program

    async def _watched(self, program: Program) -> None:
        self._on_death(str(await program.death()))


@contextlib.asynccontextmanager
async def frozen(pid: int) -> AsyncIterator[None]:
    """A process of ours is frozen for the time of a block; it goes on even if we are killed."""
    keeper = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-c", _KEEP_FROZEN, str(pid),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the process may be gone when it is to go on
        start_new_session=True,  # Ctrl-C is for us
    )  # fmt: skip
    to_keeper, from_keeper = keeper.stdin, keeper.stdout
    assert to_keeper is not None, "it is a pipe"
    assert from_keeper is not None, "it is a pipe"
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            await from_keeper.readline()
        yield
    finally:
        to_keeper.close()
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await keeper.wait()
        except (TimeoutError, asyncio.CancelledError):
            keeper.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            await keeper.wait()
            raise
