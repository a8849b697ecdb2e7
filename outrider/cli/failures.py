"""Errors that end a command, and their messages on standard error. Imports no heavy package."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

from outrider.errors import NO_ENGINE, ConfigError, InvalidRequest, OutriderError


def require_engine() -> None:
    """Raises ConfigError if torch, which commands that run models need, is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(NO_ENGINE)


class ProgramFailed(OutriderError):
    """A program ended before it served. `log_lines`: last lines of its log, its error first."""

    def __init__(self, what: str, *, exit_code: int, log_lines: list[str], log_path: Path) -> None:
        super().__init__(what)
        self.exit_code = exit_code
        self.log_lines = log_lines
        self.log_path = log_path


class Signalled(Exception):
    """The command received a signal to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + number


def explain(error: OutriderError) -> int:
    """Prints the error to standard error. Returns the exit status: 2 for a ConfigError."""
    if isinstance(error, ProgramFailed):
        _explain_program(error)
        return error.exit_code
    if isinstance(error, ConfigError):
        print(f"outrider: {error}", file=sys.stderr)
        return 2
    status = "INVALID_ARGUMENT: " if isinstance(error, InvalidRequest) else ""
    print(f"error: {status}{error}", file=sys.stderr)
    return 1


def _explain_program(error: ProgramFailed) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"✘ {error}", style="bold red", markup=False)
    for line in error.log_lines:
        console.print(f"  {line}", markup=False)
    console.print(f"  log: {error.log_path}", style="dim", markup=False)
