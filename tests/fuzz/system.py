"""The programs under attack: real processes with simulated tiers, and what the system says of them.

Owns their start and end. Knows nothing of messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from outrider.cli.supervisor import Supervisor
from tests.fuzz.corpus import VOCAB_SIZE

CONTEXT_LEN = 4_096
# A last line of a traceback; what gRPC says of bytes that are no message is its own affair.
_RAISED = re.compile(r"^\s*\|?\s*([\w.]+(?:Error|Exception|Group|Panic))\b(?!.*DecodeError)")
_OF_GRPC = ("google.protobuf.message.DecodeError",)


@dataclass(frozen=True)
class System:
    """host:port, process id and log of each program by its name."""

    addresses: dict[str, str]
    pids: dict[str, int]
    log_dir: Path
    redis_url: str | None

    def raised(self, name: str) -> list[str]:
        """The exceptions that the program's log tells of."""
        lines = (self.log_dir / f"{name}.log").read_text(errors="replace").splitlines()
        return [line for line in lines if _RAISED.match(line) and not _is_of_grpc(line)]


def _is_of_grpc(line: str) -> bool:
    return line.strip(" |").startswith(_OF_GRPC)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 if it is gone."""
    with contextlib.suppress(OSError):
        num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.asynccontextmanager
async def running(
    log_dir: Path, *, survival: float = 1.0, with_orchestrator: bool = True
) -> AsyncIterator[System]:
    """Both tiers and, unless told otherwise, an orchestrator and its Redis; main thread only."""
    shared = f"vocab_size={VOCAB_SIZE},context_len={CONTEXT_LEN}"
    simulations = {
        "target": f"step_ms=0.5,{shared}",
        "draft": f"step_ms=0.1,{shared},survival={survival}",
    }
    supervisor = Supervisor(log_dir, lambda event: None)
    try:
        redis_url = supervisor.start_redis() if with_orchestrator else None
        starting = [
            supervisor.start(name, [f"{name}_service", f"--simulate={simulation}", *_QUICK])
            for name, simulation in simulations.items()
        ]
        target, draft = await asyncio.gather(*starting)
        addresses = {"target": target, "draft": draft}
        if redis_url is not None:
            addresses["orchestrator"] = await supervisor.start(
                "orchestrator",
                [
                    "orchestrator",
                    f"--target-endpoint={target}",
                    f"--draft-endpoint={draft}",
                    f"--redis-url={redis_url}",
                    "--port=0",
                    "--log-level=warning",
                ],
            )
        pids = {name: supervisor.pid(name) for name in addresses}
        yield System(addresses, pids, log_dir, redis_url)
    finally:
        await supervisor.stop()


_QUICK = ("--port=0", "--calibration-s=0", "--log-level=warning")
