"""What a person sees of a benchmark: progress while it runs, a table and the goals at its end.

Owns what a signal does to one: it ends the measuring, and the report is of what there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from outrider.cli.running import survive_signal

if TYPE_CHECKING:
    from outrider.cli.bench.document import Document

# Of a table in a file or a pipe, which have no width.
_FILE_WIDTH = 160

Step = Callable[[str], None]


def bench_console() -> Console:
    """Standard output, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


@contextlib.contextmanager
def progress(
    console: Console,
    num_steps: int,
    document: Document,
    measured: Sized,
    warm_up: tuple[int, float] = (0, 0.0),
) -> Iterator[Step]:
    """Call what it yields before each step, with the step's name.

    A signal ends the block and not the command, once something is `measured`: the command then
    reports that much (`reporting`). `warm_up`: how many of the steps, and how much longer the
    others take, for a word on the time that all will take.
    """
    columns = (
        TextColumn("[dim]measuring[/]"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/]"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}[/]"),
    )
    shows = console.is_terminal
    began_at = time.monotonic()
    begun: list[str] = []
    _say(console, f"{num_steps} steps; Ctrl-C reports what there is by then")
    with Progress(*columns, console=console, transient=True, disable=not shows) as bar:
        task = bar.add_task("", total=num_steps)

        def step(name: str) -> None:
            bar.update(task, description=escape(name), completed=len(begun))
            if begun and len(begun) == warm_up[0]:
                each_s = (time.monotonic() - began_at) / len(begun) * warm_up[1]
                _say(console, f"all will take about {duration(each_s * (num_steps - len(begun)))}")
            begun.append(name)
            if not shows:
                console.print(f"{len(begun)}/{num_steps} {escape(name)}", highlight=False)

        try:
            yield step
        except asyncio.CancelledError:
            if not measured:
                raise
            survive_signal()
            document.is_cut = True
    if document.is_cut:
        console.print(
            f"[yellow]stopped in step {len(begun)} of {num_steps}: figures are of those before[/]",
            highlight=False,
        )


def _say(console: Console, words: str) -> None:
    console.print(f"[dim]{words}[/]", highlight=False)


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def reporting(console: Console, document: Document) -> Iterator[None]:
    """Around the tables of what was measured, which may be too little for them after a signal."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, StopIteration, TypeError, ValueError):
        if not document.is_cut:
            raise
        document.write()
        console.print("too little for a table; what was measured:")
        console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)


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
