"""`outrider` as a process, and its child processes according to /proc."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

import outrider.cli
from outrider.runtime.main import HTTP_PREFIX
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

ROOT = Path(__file__).parents[2]
# Long: every model service loads torch, and the machine may be busy.
TIMEOUT_S = 300.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "outrider", *arguments]


def environment() -> dict[str, str]:
    """Environment without variables that change settings or colours.

    One thread per program: with models this small, two threads wait for each other, and for long
    while other tests run.
    """
    hidden = ("OUTRIDER_", "REDIS_URL", "FORCE_COLOR", "NO_COLOR")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return {**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; stdout and stderr are pipes."""
    return subprocess.run(
        command(*arguments),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=TIMEOUT_S,
        check=False,
    )


def here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end in this process; programs that it starts are processes.

    In a process of its own a command that reads a model would load torch again, for seconds.
    """
    out, err = io.StringIO(), io.StringIO()
    kept = environment()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["outrider", *arguments])
        for name in os.environ.keys() - kept.keys():
            patch.delenv(name)
        for name, value in kept.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            outrider.cli.main()
    return subprocess.CompletedProcess(
        arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue()
    )


def interrupted(*arguments: str, at: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that gets SIGINT once a line of its output starts with `at`.

    `stdout` has the output of both streams.
    """
    with subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if line.startswith(at):
                    break
            else:
                raise AssertionError(f"ended before {at!r}: {''.join(output)}")
            process.send_signal(signal.SIGINT)
            output.append(process.stdout.read())
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, status, "".join(output))


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie whose parent was killed does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> dict[int, str]:
    """Running descendants of a process: command line by process id."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    level = [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        for child in level:
            with contextlib.suppress(OSError):
                raw = Path(f"/proc/{child}/cmdline").read_bytes()
                found[child] = raw.replace(b"\0", b" ").decode()
    return {child: line for child, line in found.items() if is_alive(child)}


def wait_for_draft(endpoint: str) -> None:
    """Waits until the draft has connected: the orchestrator serves without it before."""
    with grpc.insecure_channel(endpoint) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        deadline = time.monotonic() + 60
        while not stub.GetModelInfo(orchestrator_pb2.GetModelInfoRequest()).HasField("draft"):
            assert time.monotonic() < deadline, "no draft has joined"
            time.sleep(0.02)


def wait_until_dead(pids: dict[int, str], timeout_s: float = 60.0) -> None:
    """Waits until the processes have ended."""
    deadline = time.monotonic() + timeout_s
    while alive := {pid: line for pid, line in pids.items() if is_alive(pid)}:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.02)


@dataclass
class Up:
    """A running `outrider up`."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return self.lines[-1].removeprefix("listening on ")

    @property
    def http(self) -> str:
        """Address of its HTTP server."""
        line = next(line for line in self.lines if line.startswith(HTTP_PREFIX))
        return line.removeprefix(HTTP_PREFIX)

    def read_until(self, words: str) -> str:
        """Reads lines until one contains `words`; returns it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if words in line:
                return line
        raise AssertionError(f"ended without {words!r}: {self.lines}")

    def pid_of(self, words: str) -> int:
        found = {p: c for p, c in descendants(self.process.pid).items() if words in c}
        assert len(found) == 1, found
        return next(iter(found))

    def signal(self, number: signal.Signals) -> int:
        """Sends the signal, waits for the end and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def up(*arguments: str, serving: bool = True) -> Iterator[Up]:
    """Runs `outrider up` on a free port and waits until it serves; kills it at the end."""
    with subprocess.Popen(
        # Long draft wait: on a busy machine such a small draft would often be late.
        command(
            "up",
            "--port=0",
            "--http-port=none",
            "--kv-cache-tokens=8192",
            "--draft-wait-ms=20000",
            *arguments,
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    ) as process:
        started = Up(process)
        try:
            if serving:
                started.read_until("listening on ")
            yield started
        finally:
            process.kill()
