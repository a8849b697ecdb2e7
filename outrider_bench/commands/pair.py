"""`outrider bench pair`: makes a synthetic model pair for benchmarks.

Owns the child process, which needs torch, and the display of its progress.
`outrider_bench.models.synthetic` makes the pair.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider_bench.measuring.child import run_child

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TIERS = ("target", "draft")
_MODES = ("greedy", "sampled")
_MODULE = "outrider_bench.models.synthetic"
# Two searches for ε of at most 16 measurements each.
_MAX_MEASUREMENTS = 32
# Expected duration by size.
_DURATIONS = {"tiny": "takes seconds", "p1": "takes minutes", "p2": "takes many minutes"}


@dataclass(frozen=True)
class PairOptions:
    """Flags of `outrider bench pair`."""

    directory: Annotated[Path, typer.Argument(help="Folder for target/, draft/ and pair.json.")]
    size: Annotated[
        str,
        typer.Option(
            help="p1: 104M parameters, draft 10x cheaper; p2: 439M, 15x; tiny: for tests."
        ),
    ] = "p1"
    alpha: Annotated[float, typer.Option(help="Acceptance rate of the pair.")] = 0.8
    temperature: Annotated[
        float, typer.Option(help="Temperature at which --alpha applies: 0 or 1.")
    ] = 0.0
    epsilon: Annotated[
        float | None, typer.Option(help="Use this ε instead of searching for --alpha; faster.")
    ] = None
    vocab_size: Annotated[
        int | None, typer.Option(help="Tokens in the vocabulary. Default: depends on --size.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0
    dtype: Annotated[
        str, typer.Option(help="Of the checkpoints: float32, bfloat16 or float16.")
    ] = "float32"
    json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False


@takes(PairOptions)
def pair(options: PairOptions) -> None:
    """Make a model pair with realistic costs and a chosen acceptance rate, without downloads."""
    from rich.console import Console

    from outrider.cli.running import run

    console, search = Console(stderr=options.json), Search()
    report = run(_make_with_progress(options, console, search))
    if options.json:
        typer.echo(json.dumps(report or search.to_dict()))
    elif report:
        console.print(_table(options, report))
    if search.stopped is not None:
        _show_stopped(options, console, search)
        raise search.stopped


@dataclass
class Search:
    """Measurements so far, each with `epsilon` and `alpha`. `stopped`: signal that ended it."""

    measured: list[dict[str, float]] = field(default_factory=list)
    stopped: Exception | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON report of a search that made no pair."""
        return {"is_cut": True, "measurements": self.measured}

    def nearest(self, alpha: float) -> dict[str, float]:
        """Measurement whose α is nearest."""
        return min(self.measured, key=lambda one: abs(one["alpha"] - alpha))


async def _make_with_progress(
    options: PairOptions, console: Console, search: Search
) -> dict[str, Any] | None:
    """Makes the pair and shows progress. Returns its report; None if a signal ended the search."""
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

        def on_measurement(measured: dict[str, float]) -> None:
            search.measured.append(measured)
            num, found = len(search.measured), _found(measured)
            each_s = (time.monotonic() - began_at) / num
            left = (
                f", at most {duration(each_s * (_MAX_MEASUREMENTS - num))} left" if searches else ""
            )
            bar.update(task, description=f"{what}: measurement {num}: {found}{left}")
            if not shows:
                console.print(f"measurement {num}: {found}{left}", highlight=False)

        try:
            return await made_pair(options, on_measurement)
        except asyncio.CancelledError:
            if not search.measured:
                console.print("[yellow]stopped: nothing has been measured[/]")
                raise
            search.stopped = survive_signal()
    return None


def _announcement(options: PairOptions) -> str:
    takes = _DURATIONS.get(options.size, "takes minutes")
    if options.epsilon is not None:
        return takes
    return (
        f"{takes}; 4 to {_MAX_MEASUREMENTS} measurements of α, duration estimated after the first; "
        "Ctrl-C reports the results so far"
    )


def _show_stopped(options: PairOptions, console: Console, search: Search) -> None:
    nearest = search.nearest(options.alpha)
    console.print(
        f"[yellow]stopped after {len(search.measured)} measurements; no pair was written. Nearest: "
        f"{_found(nearest)}; to skip the search: --epsilon {nearest['epsilon']:g}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _found(measured: dict[str, float]) -> str:
    return f"ε {measured['epsilon']:.4g} gives α {measured['alpha']:.3f}"


async def made_pair(
    options: PairOptions, on_measurement: Callable[[dict[str, float]], None] = lambda measured: None
) -> dict[str, Any]:
    """Makes a pair in a child process; returns the content of its pair.json.

    `on_measurement` receives each measurement of the search: `epsilon` and `alpha`. Cancelling
    stops the child. Raises ConfigError for wrong arguments, InternalError if the child failed.
    """
    report: dict[str, Any] = {}

    def on_line(line: dict[str, Any]) -> None:
        if "size" in line:  # the last one
            report.update(line)
        else:
            on_measurement(line)

    await run_child(_MODULE, _arguments(options), on_line)
    return report


def _arguments(options: PairOptions) -> list[str]:
    given = {"--epsilon": options.epsilon, "--vocab-size": options.vocab_size}
    return [
        str(options.directory),
        f"--size={options.size}",
        f"--alpha={options.alpha}",
        f"--temperature={options.temperature}",
        f"--seed={options.seed}",
        f"--dtype={options.dtype}",
        *(f"{flag}={value}" for flag, value in given.items() if value is not None),
    ]


def _table(options: PairOptions, report: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=str(options.directory), show_header=False, show_edge=False)
    table.add_row("target, draft", *(_millions(report[f"{name}_parameters"]) for name in _TIERS))
    table.add_row("α greedy, at T = 1", *(f"{report[f'{mode}_acceptance']:.3f}" for mode in _MODES))
    table.add_row("vocabulary", f"{report['vocab_size']:,}", "tokens")
    table.add_row("entropy", f"{report['entropy_nats']:.2f}", "nats")
    table.add_row("ε", f"{report['epsilon']:g}", "")
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
