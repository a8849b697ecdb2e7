"""Supervisor of child processes: starts, watches and stops them in reverse order.

Owns the processes and their log files. `stack` chooses the programs, `view` shows progress.
Everything here must run on the event loop of the main thread: Linux ends a child with the thread
that started it (`outrider.runtime.child_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from outrider.cli.failures import ProgramFailed
from outrider.errors import ConfigError
from outrider.redis.embedded import RedisServer
from outrider.runtime.child_process import tied_to_this_process
from outrider.runtime.main import HTTP_PREFIX, LISTENING_PREFIX, METRICS_PREFIX

# Longer than the grace period of any program (5 s for the streams of a model service).
STOP_GRACE_S = 10.0
REDIS_NAME = "redis"
# The embedded server is polled: there is no pipe to it that would close at its end.
REDIS_POLL_INTERVAL_S = 0.25
_NUM_LINES_SHOWN = 15


class State(Enum):
    """State of a program."""

    WAITING = "waiting"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Event:
    """New state of a program, `after_s` seconds after its start."""

    name: str
    state: State
    after_s: float = 0.0
    detail: str = ""


Report = Callable[[Event], None]


@dataclass(frozen=True)
class Death:
    """The end of a program that was not stopped by us; `status`: return code, -n for signal n."""

    name: str
    status: int
    log_path: Path | None

    def __str__(self) -> str:
        log = f"; log: {self.log_path}" if self.log_path else ""
        return f"{self.name} died ({describe_status(self.status)}){log}"


def describe_status(status: int) -> str:
    """The exit status in words: exit code or signal."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit code {status}"


class Program:
    """One child process. It prints its address to standard output, its log to standard error."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log_path: Path, log_start: int
    ) -> None:
        self.name = name
        self.process = process
        self._log_path = log_path
        self._log_start = log_start
        # host:port of /metrics, once the program serves; None: it exposes none.
        self.metrics: str | None = None
        # host:port of OpenAI-compatible HTTP, as above.
        self.http: str | None = None

    @classmethod
    async def start(
        cls, name: str, arguments: list[str], log_dir: Path, cpus: Collection[int] = ()
    ) -> Program:
        """Starts `python -m` with the arguments, on these CPUs (none: any); appends to its log."""
        log_path = log_dir / f"{name}.log"
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = await asyncio.create_subprocess_exec(
                *tied_to_this_process([sys.executable, "-m", *arguments], cpus),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach only us: we stop programs in order
            )
        return cls(name, process, log_path, log_start)

    async def listening(self) -> str:
        """Waits until it serves; returns host:port. Raises ProgramFailed if it ends before."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            text = line.decode(errors="replace").strip()
            if text.startswith(METRICS_PREFIX):
                self.metrics = text.removeprefix(METRICS_PREFIX)
            if text.startswith(HTTP_PREFIX):
                self.http = text.removeprefix(HTTP_PREFIX)
            if text.startswith(LISTENING_PREFIX):
                return text.removeprefix(LISTENING_PREFIX)
        status = (await self.death()).status
        raise ProgramFailed(
            f"{self.name} did not start ({describe_status(status)})",
            exit_code=max(1, status),  # negative for a signal; 0 is a failure here as well
            log_lines=await asyncio.to_thread(self._last_log_lines),
            log_path=self._log_path,
        )

    async def death(self) -> Death:
        """Waits for its end."""
        assert self.process.stdout is not None
        while await self.process.stdout.read(1 << 16):
            pass
        return Death(self.name, await self.process.wait(), self._log_path)

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after a grace period; returns when it has ended."""
        self._send(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _last_log_lines(self) -> list[str]:
        """The last lines of this run's log; from the settings error on, if there is one."""
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith(f"{self.name}: ")]
        if errors:  # the errors that `outrider.runtime.main` prints
            return lines[errors[0] :][:_NUM_LINES_SHOWN]
        return lines[-_NUM_LINES_SHOWN:]


class Supervisor:
    """Starts programs, and stops them in reverse order. `stop` must be called in any case."""

    def __init__(self, log_dir: Path, report: Report) -> None:
        self._log_dir = log_dir
        self._report = report
        self._redis: RedisServer | None = None
        self._programs: list[Program] = []
        self._watches: dict[asyncio.Task[Death], str] = {}

    def start_redis(self) -> str:
        """Starts an embedded Redis and returns its URL; blocks for some tens of ms."""
        started_at = time.monotonic()
        self._report(Event(REDIS_NAME, State.LOADING))
        self._redis = RedisServer()
        self._redis.start()
        self._watch(REDIS_NAME, asyncio.create_task(_redis_death(self._redis)))
        self._report(Event(REDIS_NAME, State.READY, time.monotonic() - started_at))
        return self._redis.url

    async def start(self, name: str, arguments: list[str], cpus: Collection[int] = ()) -> str:
        """Starts a program; returns host:port once it serves. Raises ProgramFailed, ConfigError."""
        started_at = time.monotonic()
        self._report(Event(name, State.LOADING))
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            program = await Program.start(name, arguments, self._log_dir, cpus)
        except OSError as error:
            raise ConfigError(f"{name} cannot be started: {error}") from error
        self._programs.append(program)
        try:
            address = await program.listening()
        except ProgramFailed as error:
            self._report(Event(name, State.FAILED, time.monotonic() - started_at, str(error)))
            raise
        self._watch(name, asyncio.create_task(program.death()))
        self._report(Event(name, State.READY, time.monotonic() - started_at, address))
        return address

    def pid(self, name: str) -> int:
        """Process id of a started program."""
        return next(p.process.pid for p in self._programs if p.name == name)

    def metrics(self) -> dict[str, str]:
        """host:port of each program's /metrics endpoint, by name; programs without one left out."""
        return {p.name: p.metrics for p in self._programs if p.metrics is not None}

    def http(self) -> str | None:
        """host:port of OpenAI-compatible HTTP; None if there is none."""
        return next((p.http for p in self._programs if p.http is not None), None)

    def _watch(self, name: str, death: asyncio.Task[Death]) -> None:
        self._watches[death] = name

    async def next_death(self) -> Death:
        """Waits for the next program to end; reports each once. One task at a time may wait."""
        done, _ = await asyncio.wait(self._watches, return_when=asyncio.FIRST_COMPLETED)
        first = min(done, key=list(self._watches).index)
        self._report(Event(self._watches.pop(first), State.FAILED))
        return first.result()

    async def stop_one(self, name: str) -> None:
        """Stops one program; its end is not a death."""
        watch = next(task for task, watched in self._watches.items() if watched == name)
        del self._watches[watch]
        watch.cancel()
        await asyncio.wait([watch])
        await next(program for program in self._programs if program.name == name).stop()

    async def stop(self) -> None:
        """Stops the programs in reverse order; if cancelled, kills them. Leaves no process."""
        try:
            await self._stop_watches()
            for program in reversed(self._programs):
                if program.process.returncode is not None:
                    continue
                self._report(Event(program.name, State.STOPPING))
                await program.stop()
                self._report(Event(program.name, State.STOPPED))
        finally:
            for program in self._programs:
                program.kill()
            if self._redis is not None:
                self._redis.stop()
                self._report(Event(REDIS_NAME, State.STOPPED))

    async def _stop_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._watches.clear()


async def _redis_death(server: RedisServer) -> Death:
    while (status := server.exit_status()) is None:  # noqa: ASYNC110 (no event: another process)
        await asyncio.sleep(REDIS_POLL_INTERVAL_S)
    return Death(REDIS_NAME, status, None)
