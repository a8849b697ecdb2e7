"""Terminal output of a benchmark: progress while it runs, then tables and goals.

Also owns signal handling: after a signal the command reports the results so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from outrider.cli.running import survive_signal

if TYPE_CHECKING:
    from outrider_bench.measuring.document import Document

# Width of a table in a file or a pipe, which have none.
_FILE_WIDTH = 160

# Begins a step of this name.
Step = Callable[[str], None]


def bench_console(*, is_stderr: bool = False) -> Console:
    """Console for standard output or error, wide enough for a table."""
    console = Console(stderr=is_stderr)
    return console if console.is_terminal else Console(width=_FILE_WIDTH, stderr=is_stderr)


class Report(Protocol):
    """Report of a command. `stopped` is set if a signal or an error ended the measurement."""

    stopped: Exception | None


@contextlib.contextmanager
def progress(
    console: Console,
    num_steps: int,
    report: Report,
    measured: Sized,
    *,
    warm_up: tuple[int, float] = (1, 1.0),
    expected_s: float | None = None,
) -> Iterator[Step]:
    """Announces the expected duration of `num_steps` and shows progress.

    Yields the function to call at the begin of each step. Once `measured` is not empty, a signal or
    an error ends only the block: the command reports these results, then raises it (`reporting`).
    `expected_s` is the duration of all steps, if known. Otherwise it is estimated after the
    warm-up: `warm_up` is the number of warm-up steps, and the duration of each later step relative
    to one of them.
    """
    steps = _Steps(console, num_steps, warm_up, expected_s)
    try:
        with steps.shown():
            yield steps.begin
    except asyncio.CancelledError:
        if not measured:
            _warn(console, f"stopped in {steps.place}: nothing has been measured")
            raise
        report.stopped = survive_signal()
        _warn(console, f"stopped in {steps.place}: reports the results so far")
    except Exception as error:
        if not measured:
            raise
        report.stopped = error
        _warn(console, f"failed in {steps.place}: reports the results so far")


class _Steps:
    """Progress of a command, with the time left: a bar on a terminal, lines otherwise."""

    def __init__(
        self,
        console: Console,
        num_steps: int,
        warm_up: tuple[int, float],
        expected_s: float | None,
    ) -> None:
        self._console = console
        self._num_steps = num_steps
        self._num_first, self._factor = warm_up
        self._num_begun = 0
        self._began_at = self._measured_from = time.monotonic()
        # Expected duration of the remaining steps.
        self._left_s = expected_s
        columns = (
            TextColumn("[dim]measuring[/]"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[left]}{task.description}[/]"),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=num_steps, left="")

    @property
    def place(self) -> str:
        return f"step {self._num_begun} of {self._num_steps}"

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        left = self._left()
        text = "duration estimated after the first steps" if left is None else f"about {left}"
        _note(
            self._console,
            f"{self._num_steps} steps, {text}; Ctrl-C reports the results so far",
        )
        with self._bar:
            yield

    def begin(self, name: str) -> None:
        if not self._num_begun:  # excludes the start of the system, which happens once
            self._began_at = time.monotonic()
        self._estimate()
        left = self._left()
        self._bar.update(
            self._task,
            description=escape(name),
            completed=self._num_begun,
            left="" if left is None else f"{left} left  ",
        )
        self._num_begun += 1
        if not self._bar.disable:
            return
        text = escape(name) if left is None else f"{escape(name)} ({left} left)"
        self._console.print(f"{self._num_begun}/{self._num_steps} {text}", highlight=False)

    def _estimate(self) -> None:
        """Estimates the time left: first from the warm-up steps, later from the measured steps."""
        num_done = self._num_begun
        if num_done < self._num_first or not num_done:
            return
        now, is_first = time.monotonic(), num_done == self._num_first
        if is_first:
            each_s = (now - self._began_at) / num_done * self._factor
            if self._left_s is None:
                total_s = each_s * (self._num_steps - num_done)
                _note(self._console, f"the remaining steps take about {duration(total_s)}")
            self._measured_from = now
        else:
            each_s = (now - self._measured_from) / (num_done - self._num_first)
        self._left_s = each_s * (self._num_steps - num_done)

    def _left(self) -> str | None:
        return None if self._left_s is None else duration(self._left_s)


def _note(console: Console, text: str) -> None:
    console.print(f"[dim]{text}[/]", highlight=False)


def _warn(console: Console, text: str) -> None:
    console.print(f"[yellow]{text}[/]", highlight=False)


def duration(seconds: float) -> str:
    """A duration as text, in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def reporting(console: Console, document: Document) -> Iterator[None]:
    """Wraps the report of a command.

    After a signal or an error there may be too few results for a table; then only the JSON document
    is written. Raises at the end of the block what ended the measurement.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, StopIteration, TypeError, ValueError):
        if not document.is_cut:
            raise
        document.write()
        console.print("too few results for a table; the samples are in:")
        console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)
    if document.stopped is not None:
        raise document.stopped


def table(title: str, columns: Sequence[str]) -> Table:
    """Table whose first column is a left-aligned name; numbers are right-aligned."""
    made = Table(title=title, title_justify="left", show_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place else "left")
    return made


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """The number as text; empty for None."""
    return "" if value is None else f"{value:.{digits}f}{unit}"


def share(value: float | None) -> str:
    """The share in percent as text; empty for None."""
    return "" if value is None else f"{100 * value:.0f} %"


def times(value: float | None, *, is_goal: bool = False) -> str:
    """The ratio as text, empty for None. `is_goal`: green from 1 on, red below."""
    if value is None:
        return ""
    if not is_goal:
        return f"{value:.2f}×"
    colour = "green" if value >= 1 else "red"
    return f"[bold {colour}]{value:.2f}×[/]"


def finish(console: Console, document: Document, shown: Sequence[Table]) -> None:
    """Prints the tables, each goal with the measured value, and the paths of the files."""
    for one in shown:
        console.print(one)
        console.print()
    for goal in document.goals_here:
        sign = "≤" if goal.is_most else "≥"
        got = "not measured" if goal.got is None else f"{goal.got:.3g}"
        mark = {True: "[green]✔[/]", False: "[red]✘[/]", None: "·"}[goal.is_met]
        console.print(f"{mark} {goal.text}: {sign} {goal.asked:g}, measured [bold]{got}[/]")
    console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)
    if document.plot_path.exists():
        console.print(f"[dim]{document.plot_path}[/]", soft_wrap=True, highlight=False)
