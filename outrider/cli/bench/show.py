"""What a person sees of a benchmark: progress while it runs, a table and the goals at its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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
def progress(console: Console, num_steps: int) -> Iterator[Step]:
    """Call what it yields before each step, with the step's name."""
    columns = (
        TextColumn("[dim]measuring[/]"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.description}[/]"),
    )
    shows = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shows) as bar:
        task = bar.add_task("", total=num_steps)
        begun: list[str] = []

        def step(name: str) -> None:
            bar.update(task, description=escape(name), completed=len(begun))
            begun.append(name)

        yield step


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
    for goal in document.goals:
        sign = "≤" if goal.is_most else "≥"
        got = "not measured" if goal.got is None else f"{goal.got:.3g}"
        mark = {True: "[green]✔[/]", False: "[red]✘[/]", None: "·"}[goal.is_met]
        console.print(f"{mark} {goal.text}: {sign} {goal.asked:g}, got [bold]{got}[/]")
    console.print(f"[dim]{document.path}[/]", soft_wrap=True, highlight=False)
    if document.plot_path.exists():
        console.print(f"[dim]{document.plot_path}[/]", soft_wrap=True, highlight=False)
