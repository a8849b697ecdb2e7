"""`outrider bench pair`: makes a synthetic pair of models to measure with.

Owns the child process that makes it, which takes torch, and what is shown of it meanwhile. How a
pair is made is `outrider_bench.models.synthetic`'s business.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.failures import Signalled, require_engine
from outrider.cli.options import takes
from outrider.errors import ConfigError, InternalError
from outrider.runtime.child_process import tied_to_this_process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TIERS = ("target", "draft")
_LAWS = ("greedy", "sampled")
_MODULE = "outrider_bench.models.synthetic"
# Two searches for ε of at most 16 measurements each, and how long the whole takes.
_MOST_SEARCHES = 32
_TAKES = {"tiny": "takes seconds", "p1": "takes minutes", "p2": "takes many minutes"}
# Its exit status where an argument is wrong; the last line it says is why.
_USAGE_STATUS = 2


@dataclass(frozen=True)
class PairOptions:
    directory: Annotated[
        Path, typer.Argument(help="Where target/, draft/ and pair.json are written.")
    ]
    size: Annotated[
        str,
        typer.Option(help="p1: 104M parameters, draft 10x cheaper; p2: 439M, 15x; tiny: tests."),
    ] = "p1"
    alpha: Annotated[float, typer.Option(help="Share of draft tokens that are accepted.")] = 0.8
    temperature: Annotated[float, typer.Option(help="Where α is meant: 0 or 1.")] = 0.0
    epsilon: Annotated[
        float | None, typer.Option(help="Taken instead of a search for --alpha: quick.")
    ] = None
    vocab_size: Annotated[int | None, typer.Option(help="Default: the size's.")] = None
    seed: Annotated[int, typer.Option(help="Another seed, another pair.")] = 0
    json: Annotated[bool, typer.Option("--json", help="The report as JSON, nothing else.")] = False


@takes(PairOptions)
def pair(options: PairOptions) -> None:
    """Make a model pair of realistic cost and chosen acceptance; nothing is downloaded."""
    from rich.console import Console

    from outrider.cli.running import run

    console, search = Console(stderr=options.json), Search()
    report = run(_shown(options, console, search))
    if options.json:
        typer.echo(json.dumps(report or search.to_dict()))
    elif report:
        console.print(_table(options, report))
    if search.stopped is not None:
        _show_stopped(options, console, search)
        raise search.stopped


@dataclass
class Search:
    """The measurements so far, each with `epsilon` and `alpha`. `stopped`: by which signal."""

    measured: list[dict[str, float]] = field(default_factory=list)
    stopped: Signalled | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, of a search without a pair."""
        return {"is_cut": True, "measurements": self.measured}

    def nearest(self, alpha: float) -> dict[str, float]:
        return min(self.measured, key=lambda one: abs(one["alpha"] - alpha))


async def _shown(options: PairOptions, console: Console, search: Search) -> dict[str, Any] | None:
    """The pair's report; None: a signal has ended the search."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from outrider.cli.running import survive_signal
    from outrider_bench.measuring.show import duration

    what = f"making {options.size}"
    searches = options.epsilon is None
    console.print(f"[dim]{what}: {_announcement(options)}[/]", highlight=False, soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began_at = time.monotonic()
    shows = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shows) as bar:
        task = bar.add_task(f"{what}: random weights")

        def hear(measured: dict[str, float]) -> None:
            search.measured.append(measured)
            num, found = len(search.measured), _found(measured)
            each_s = (time.monotonic() - began_at) / num
            left = f", at most {duration(each_s * (_MOST_SEARCHES - num))} left" if searches else ""
            bar.update(task, description=f"{what}: measurement {num}: {found}{left}")
            if not shows:
                console.print(f"measurement {num}: {found}{left}", highlight=False)

        try:
            return await made_pair(options, hear)
        except asyncio.CancelledError:
            if not search.measured:
                console.print("[yellow]stopped: nothing has been measured[/]")
                raise
            search.stopped = survive_signal()
    return None


def _announcement(options: PairOptions) -> str:
    takes = _TAKES.get(options.size, "takes minutes")
    if options.epsilon is not None:
        return takes
    return (
        f"{takes}; 4 to {_MOST_SEARCHES} measurements of α, the first shows how long they take; "
        "Ctrl-C reports the results so far"
    )


def _show_stopped(options: PairOptions, console: Console, search: Search) -> None:
    nearest = search.nearest(options.alpha)
    console.print(
        f"[yellow]stopped after {len(search.measured)} measurements; no pair was written. Nearest: "
        f"{_found(nearest)}; without a search: --epsilon {nearest['epsilon']:g}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _found(measured: dict[str, float]) -> str:
    return f"ε {measured['epsilon']:.4g} gives α {measured['alpha']:.3f}"


async def made_pair(
    options: PairOptions, hear: Callable[[dict[str, float]], None] = lambda measured: None
) -> dict[str, Any]:
    """Makes it in a process of its own; the content of its pair.json.

    `hear` gets each measurement of the search: `epsilon` and `alpha`. Cancelling stops the child.
    Raises ConfigError for what cannot be made, InternalError where the child failed.
    """
    require_engine()
    process = await asyncio.create_subprocess_exec(
        *tied_to_this_process([sys.executable, "-m", _MODULE, *_arguments(options)]),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
    )
    assert process.stdout is not None, "its output is a pipe"
    assert process.stderr is not None, "its output is a pipe"
    told: dict[str, Any] = {}
    try:
        async with asyncio.TaskGroup() as tasks:
            said = tasks.create_task(process.stderr.read())
            async for line in process.stdout:
                told = json.loads(line)
                if "size" not in told:  # the report has; it comes last
                    hear(told)
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    words = said.result().decode(errors="replace")
    if process.returncode == _USAGE_STATUS:
        raise ConfigError(words.rstrip().rpartition("\n")[2])
    if process.returncode:
        raise InternalError(f"{_MODULE} failed:\n{words[-2000:]}")
    return told


def _arguments(options: PairOptions) -> list[str]:
    given = {"--epsilon": options.epsilon, "--vocab-size": options.vocab_size}
    return [
        str(options.directory),
        f"--size={options.size}",
        f"--alpha={options.alpha}",
        f"--temperature={options.temperature}",
        f"--seed={options.seed}",
        *(f"{flag}={value}" for flag, value in given.items() if value is not None),
    ]


def _table(options: PairOptions, report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=str(options.directory), show_header=False, show_edge=False)
    table.add_row("target, draft", *(_millions(report[f"{name}_parameters"]) for name in _TIERS))
    table.add_row("α greedy, at T = 1", *(f"{report[f'{law}_acceptance']:.3f}" for law in _LAWS))
    table.add_row("vocabulary", f"{report['vocab_size']:,}", "tokens")
    table.add_row("entropy", f"{report['entropy_nats']:.2f}", "nats")
    table.add_row("ε", f"{report['epsilon']:g}", "")
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
