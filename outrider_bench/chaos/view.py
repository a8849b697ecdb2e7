"""Terminal output of `outrider chaos`: expected duration, progress and summary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from outrider_bench.measuring.show import duration, number, table

if TYPE_CHECKING:
    from outrider_bench.chaos.report import Summary
    from outrider_bench.chaos.run import Progress as Report

_NUM_PROBLEMS_SHOWN = 10
# Progress lines per phase if the output is no terminal.
_NUM_LINES = 10


def announce(console: Console, num_generations: int, num_concurrent: int, faults_s: float) -> None:
    """Prints the expected duration, as far as it is known before the system serves."""
    console.print(
        f"[dim]at least {num_generations} generations, {num_concurrent} at a time; every fault "
        f"occurs once, which takes about {duration(faults_s)}; the total time is estimated after "
        "the first generations; Ctrl-C stops and reports the results so far[/]",
        highlight=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def progress(console: Console, num_concurrent: int) -> Iterator[Report]:
    """Yields a progress callback: a bar on a terminal, lines otherwise."""
    columns = (
        TextColumn("[dim]{task.description}[/]"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[left]}[/]"),
    )
    shows = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shows) as bar:
        view = _ProgressView(console, bar, num_concurrent)
        yield view.report


class _ProgressView:
    """Progress of the phases, with an estimate of the time left."""

    def __init__(self, console: Console, bar: Progress, num_concurrent: int) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("", total=None, left="")
        # The rate is estimated after this many generations.
        self._num_first = num_concurrent
        self._phase = ""
        self._began_at = 0.0
        self._num_lines = 0
        self._has_estimated = False

    def report(self, what: str, num_done: int, total: int) -> None:
        """Shows progress of a phase."""
        now = time.monotonic()
        if what != self._phase:
            self._phase, self._began_at, self._num_lines, self._has_estimated = what, now, 0, False
            if self._bar.disable:
                self._console.print(f"{what} …", style="dim", highlight=False)
        left = self._left(now, num_done, total)
        text = "" if left is None else f"about {left} left"
        self._bar.update(self._task, description=what, completed=num_done, total=total, left=text)
        if left is None:
            return
        if not self._has_estimated and what == "generations":
            self._console.print(f"[dim]the load will take about {left}[/]", highlight=False)
        self._has_estimated = True
        if self._bar.disable and num_done * _NUM_LINES // max(1, total) > self._num_lines:
            self._num_lines = num_done * _NUM_LINES // max(1, total)
            self._console.print(f"{what} {num_done}/{total}, {text}", style="dim", highlight=False)

    def _left(self, now: float, num_done: int, total: int) -> str | None:
        if num_done < min(self._num_first, total) or not num_done:
            return None
        return duration((now - self._began_at) / num_done * (total - num_done))


def show_summary(console: Console, summary: Summary, log_dir: Path, path: Path) -> None:
    """Prints the table of faults, the counts, the problems and the paths of the files."""
    from outrider_bench.chaos.report import first_problems

    faults = table("faults", ("fault", "times", "streams", "next token p50 s", "longest s"))
    for row in summary.faults:
        waits = (number(row.wait_p50_s), number(row.wait_max_s))
        faults.add_row(row.name, str(row.num_times), str(row.num_streams), *waits)
    console.print(faults)
    console.print(
        f"{summary.num_generations} generations, {summary.num_tokens} tokens, "
        f"{summary.num_faults} faults in {summary.duration_s:.0f} s; {summary.num_resumes} resumed",
        highlight=False,
    )
    if summary.is_cut:
        console.print(
            f"[yellow]stopped: {summary.num_generations} generations had ended, "
            f"{summary.num_audited} of them were audited (output and session in Redis); "
            f"{summary.num_problems} problems found[/]",
            highlight=False,
            soft_wrap=True,
        )
    for what in first_problems(summary.problems, _NUM_PROBLEMS_SHOWN):
        console.print(f"[bold red]✘[/] {escape(what)}", soft_wrap=True, highlight=False)
    if summary.problems:
        console.print(f"[dim]logs: {log_dir}[/]", soft_wrap=True, highlight=False)
    elif not summary.is_cut:
        console.print("[green]✔[/] nothing lost, repeated or changed", highlight=False)
    console.print(f"[dim]{path}[/]", soft_wrap=True, highlight=False)
