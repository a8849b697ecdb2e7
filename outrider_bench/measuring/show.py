"""What a person sees of a benchmark: progress while it runs, a table and the goals at its end.

Owns what a signal does to one: it ends the measuring, and the report is of what there is.
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

from outrider.cli.failures import Signalled
from outrider.cli.running import survive_signal

if TYPE_CHECKING:
    from outrider_bench.measuring.document import Document

# Of a table in a file or a pipe, which have no width.
_FILE_WIDTH = 160

Step = Callable[[str], None]


def bench_console() -> Console:
    """Standard output, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


class Report(Protocol):
    """What a command reports. `stopped` is set where a signal has ended the measuring."""

    stopped: Signalled | None


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
    """Announces how long `num_steps` take and shows progress. Yields what to call before each step.

    A signal ends the block and not the command, once something is `measured`: the command then
    reports that much (`reporting`). `expected_s`: duration of all steps, where it is known.
    Otherwise it is estimated after the first steps: `warm_up` is their number, and how many times
    as long each of the others takes.
    """
    steps = _Steps(console, num_steps, warm_up, expected_s)
    try:
        with steps.shown():
            yield steps.begin
    except asyncio.CancelledError:
        if not measured:
            _warn(console, f"stopped in {steps.place}: nothing was measured by then")
            raise
        report.stopped = survive_signal()
        _warn(console, f"stopped in {steps.place}: figures are of what was measured before")


class _Steps:
    """The steps of a command: a bar on a terminal, lines elsewhere; both with the time left."""

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
        # Of all steps that are not done yet.
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
        known = self._left_s is not None
        words = f"about {duration(self._left_s or 0)}" if known else "the first shows for how long"
        _say(
            self._console,
            f"{self._num_steps} steps, {words}; Ctrl-C reports what there is by then",
        )
        with self._bar:
            yield

    def begin(self, name: str) -> None:
        if not self._num_begun:  # what is started before that is started once
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
        """After the first steps, and from then on by all of those that are measured."""
        num_done = self._num_begun
        if num_done < self._num_first or not num_done:
            return
        now, is_first = time.monotonic(), num_done == self._num_first
        if is_first:
            each_s = (now - self._began_at) / num_done * self._factor
            if self._left_s is None:
                total_s = each_s * (self._num_steps - num_done)
                _say(self._console, f"all will take about {duration(total_s)}")
            self._measured_from = now
        else:
            each_s = (now - self._measured_from) / (num_done - self._num_first)
        self._left_s = each_s * (self._num_steps - num_done)

    def _left(self) -> str | None:
        return None if self._left_s is None else duration(self._left_s)


def _say(console: Console, words: str) -> None:
    console.print(f"[dim]{words}[/]", highlight=False)


def _warn(console: Console, words: str) -> None:
    console.print(f"[yellow]{words}[/]", highlight=False)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def reporting(console: Console, document: Document) -> Iterator[None]:
    """Around the tables of what was measured, which may be too little for them after a signal.

    Raises Signalled at its end if a signal has ended the measuring.
    """
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, StopIteration, TypeError, ValueError):
        if not document.is_cut:
            raise
        document.write()
        console.print("too little for a table; what was measured:")
        console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)
    if document.stopped is not None:
        raise document.stopped


def table(title: str, columns: Sequence[str]) -> Table:
    """Numbers to the right; the first column is a name."""
    made = Table(title=title, title_justify="left", show_edge=False, header_style="bold")
    for place, name in enumerate(columns):
        made.add_column(name, justify="right" if place else "left")
    return made


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Nothing for what does not apply."""
    return "" if value is None else f"{value:.{digits}f}{unit}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def times(value: float | None, *, is_goal: bool = False) -> str:
    """A ratio; in colour where it says who has won."""
    if value is None:
        return ""
    if not is_goal:
        return f"{value:.2f}×"
    colour = "green" if value >= 1 else "red"
    return f"[bold {colour}]{value:.2f}×[/]"


def finish(console: Console, document: Document, shown: Sequence[Table]) -> None:
    """The tables, each goal beside what was got, and where the files are."""
    for one in shown:
        console.print(one)
        console.print()
    for goal in document.goals_here:
        sign = "≤" if goal.is_most else "≥"
        got = "not measured" if goal.got is None else f"{goal.got:.3g}"
        mark = {True: "[green]✔[/]", False: "[red]✘[/]", None: "·"}[goal.is_met]
        console.print(f"{mark} {goal.text}: {sign} {goal.asked:g}, got [bold]{got}[/]")
    console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)
    if document.plot_path.exists():
        console.print(f"[dim]{document.plot_path}[/]", soft_wrap=True, highlight=False)
