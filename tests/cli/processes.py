"""`outrider` as users run it: real processes, and what is left of them according to /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

ROOT = Path(__file__).parents[2]
# Generous: torch is loaded in every model service, and the machine may be busy.
TIMEOUT_S = 300.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "outrider", *arguments]


def environment() -> dict[str, str]:
    """Without what would change the programs' settings or colours.

    One thread for each of them: two on models this small wait for each other, for ever so long
    where other tests run beside.
    """
    hidden = ("OUTRIDER_", "REDIS_URL", "FORCE_COLOR", "NO_COLOR")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return {**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Waits for its end; stdout and stderr are pipes."""
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


def interrupted(*arguments: str, at: str) -> subprocess.CompletedProcess[str]:
    """A command that gets Ctrl-C's signal once a line of its output begins with `at`.

    `stdout` is all it said, on both streams.
    """
    with subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if line.startswith(at):
                    break
            else:
                raise AssertionError(f"ended before {at!r}: {''.join(said)}")
            process.send_signal(signal.SIGINT)
            said.append(process.stdout.read())
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, status, "".join(said))


def is_alive(pid: int) -> bool:
    """A zombie that nobody reaps (its parent was killed) is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> dict[int, str]:
    """The living processes below it, with their command lines."""
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
    """An orchestrator serves without a draft that is slow to answer; it joins when it does."""
    with grpc.insecure_channel(endpoint) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        deadline = time.monotonic() + 60
        while not stub.GetModelInfo(orchestrator_pb2.GetModelInfoRequest()).HasField("draft"):
            assert time.monotonic() < deadline, "no draft has joined"
            time.sleep(0.02)


def wait_until_dead(pids: dict[int, str], timeout_s: float = 60.0) -> None:
    """By default for so long as says that they never will; a service has its grace of seconds."""
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

    def read_until(self, words: str) -> str:
        """The line that has them."""
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
        """Its exit status after that."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def up(*arguments: str, serving: bool = True) -> Iterator[Up]:
    """On a free port; awaited until it serves; killed at the end if it is still there."""
    with subprocess.Popen(
        # Patient: on a busy machine the orchestrator would often not wait for so small a draft.
        command("up", "--port=0", "--kv-cache-tokens=8192", "--draft-wait-ms=20000", *arguments),
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
