"""Child process of a command: a module that needs torch and prints lines of JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from outrider.cli.failures import require_engine
from outrider.errors import ConfigError, InternalError, OutriderError
from outrider.runtime.child_process import tied_to_this_process

# Exit status of the child for a wrong argument; the last line of its stderr is the message.
USAGE_STATUS = 2
# Longest line of JSON.
_MAX_LINE_BYTES = 1 << 26


def print_lines(lines: Iterable[Any]) -> int:
    """What the child's main does: prints each value as a line of JSON. Returns its exit status."""
    try:
        for line in lines:
            print(json.dumps(line), flush=True)
    except OutriderError as error:
        print(error, file=sys.stderr)
        return USAGE_STATUS
    return 0


async def run_child(
    module: str, arguments: Sequence[str], on_line: Callable[[Any], None], stdin: str = ""
) -> None:
    """Runs `python -m module`; `on_line` receives each line of its output, parsed as JSON.

    Cancelling stops the child. Raises ConfigError if the child refuses its arguments, InternalError
    if it fails.
    """
    require_engine()
    process = await asyncio.create_subprocess_exec(
        *tied_to_this_process([sys.executable, "-m", module, *arguments]),
        stdin=PIPE if stdin else DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        limit=_MAX_LINE_BYTES,
    )
    assert process.stdout is not None, "its output is a pipe"
    assert process.stderr is not None, "its output is a pipe"
    try:
        async with asyncio.TaskGroup() as tasks:
            stderr = tasks.create_task(process.stderr.read())
            if process.stdin is not None:
                process.stdin.write(stdin.encode())
                process.stdin.close()
            async for line in process.stdout:
                on_line(json.loads(line))
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    message = stderr.result().decode(errors="replace")
    if process.returncode == USAGE_STATUS:
        raise ConfigError(message.rstrip().rpartition("\n")[2])
    if process.returncode:
        raise InternalError(f"{module} failed:\n{message[-2000:]}")
