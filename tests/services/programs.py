"""A service as a process: its start, standard output and error, and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Most of it is importing torch and transformers on a busy machine.
END_TIMEOUT_S = 120.0
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT?.*\[(debug|info|warning|error) *\]")
# Triton 3.9 in torch's CUDA build prints at exit what its bindings have not freed.
_NANOBIND_LINE = re.compile(r"nanobind: | - (leaked|\.\.\.)|See https://nanobind")


class Ended(NamedTuple):
    status: int | None
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """Lines of standard error that are neither logs nor another package's."""
        lines = self.stderr.splitlines()
        return [
            line for line in lines if not _LOG_LINE.match(line) and not _NANOBIND_LINE.match(line)
        ]


@contextlib.asynccontextmanager
async def program(*words: str, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OUTRIDER_", "REDIS_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *words,
        cwd=ROOT,
        env={**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> Ended:
    async with asyncio.timeout(END_TIMEOUT_S):
        stdout, stderr = await process.communicate()
    return Ended(process.returncode, stdout.decode(), stderr.decode())
