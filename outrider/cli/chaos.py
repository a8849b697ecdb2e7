"""`outrider chaos`: load under faults on a system of its own, or on yours, and what came of it.

Owns the flags, the progress bar and the files. Knows no fault.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.cli.stack_options import StackOptions, kept_to_itself
from outrider.errors import ConfigError, OutriderError

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.chaos.report import Summary
    from outrider.chaos.run import Findings, Load, Progress

# No model, a truth that every output is a pure function of: what is tested is all but the engine.
_SIMULATED_TARGET = "step_ms=25,row_ms=0.3,vocab_size=512"
_SIMULATED_DRAFT = "step_ms=2,row_ms=0.1,vocab_size=512,survival=0.8/0.7/0.6"
_QUICK: dict[str, Any] = {
    "generations": 36,
    "concurrent": 12,
    "max_tokens": 160,
    "faults": "quick",
    "gap": 0.6,
    "longest": 3.5,
}
_NUM_TOLD = 10


@dataclass(frozen=True)
class ChaosOptions:
    endpoint: Annotated[
        str | None,
        typer.Option(help="Orchestrators of yours, host:port,host:port. Default: an own system."),
    ] = None
    fault: Annotated[
        list[str] | None,
        typer.Option(help="With --endpoint: a shell command that breaks something. Repeatable."),
    ] = None
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one --fault to the next.")] = (
        30.0
    )
    generations: Annotated[int, typer.Option(min=1, help="At least so many.")] = 1000
    concurrent: Annotated[int, typer.Option(min=1, help="Callers at a time.")] = 32
    max_tokens: Annotated[int, typer.Option(min=2, help="Outputs have 1 to so many tokens.")] = 300
    seed: Annotated[int, typer.Option(help="Of requests, callers and faults.")] = 0
    faults: Annotated[
        str,
        typer.Option(
            help="all, quick, none, or a list: draft,redis-kill,freeze. Each at least once."
        ),
    ] = "all"
    gap: Annotated[float, typer.Option(min=0.05, help="Mean seconds from fault to fault.")] = 1.5
    longest: Annotated[float, typer.Option(min=0.1, help="Seconds of the longest fault.")] = 5.0
    simulate: Annotated[
        bool, typer.Option("--simulate", help="No models: simulated tiers, all else is real.")
    ] = False
    target: Annotated[
        str | None, typer.Option(help="Directory or hub name. Default: the quickstart target.")
    ] = None
    draft: Annotated[str | None, typer.Option(help="Likewise.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    kv_cache_tokens: Annotated[
        int, typer.Option(help="Tokens of KV cache in each model service.")
    ] = 32_768
    out: Annotated[Path, typer.Option(help="Where chaos.json and chaos.md go.")] = Path(
        "chaos-results"
    )
    report: Annotated[
        Path | None, typer.Option(help="A Markdown page whose part between two marks is renewed.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="A short one.")] = False

    def quickened(self) -> ChaosOptions:
        """With --quick: less of all that was not given otherwise."""
        if not self.quick:
            return self
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{k: v for k, v in _QUICK.items() if getattr(self, k) == defaults[k]})


@takes(ChaosOptions)
def chaos(options: ChaosOptions) -> None:
    """Break a system on purpose under load, and prove that no token is lost, repeated or changed.

    By default a system of its own: two replicas of each tier, two orchestrators, a Redis.
    """
    from rich.console import Console

    from outrider.chaos.report import summarised
    from outrider.cli.running import run

    options = options.quickened()
    console, logs = Console(), _Logs(options.out)
    with logs, _progress(console) as progress:
        findings = run(_run(options, logs.path, progress))
        summary = summarised(findings)
        logs.keeps = bool(summary.problems)
    _write(options, summary)
    _tell(console, options, summary, logs.path)
    raise typer.Exit(1 if summary.problems else 0)


async def _run(options: ChaosOptions, log_dir: Path, progress: Progress) -> Findings:
    from outrider.chaos.faults import FAULTS, QUICK_FAULTS, parse_faults
    from outrider.chaos.own import Disturbance, run_on_own

    if options.endpoint is not None:
        return await _run_on_yours(options, progress)
    if options.fault:
        raise ConfigError("--fault: only with --endpoint; faults of an own system are --faults")
    named = {"all": FAULTS, "quick": QUICK_FAULTS, "none": ()}.get(options.faults)
    names = parse_faults(options.faults) if named is None else named
    disturbance = Disturbance(names, options.gap, options.longest, is_once=options.quick)
    load = _load(options)
    return await run_on_own(load, disturbance, _stack_options(options), log_dir, progress)


async def _run_on_yours(options: ChaosOptions, progress: Progress) -> Findings:
    from outrider.chaos.run import Run
    from outrider.chaos.shell import ShellFaults

    assert options.endpoint is not None, "it was given"
    endpoints = [part.strip() for part in options.endpoint.split(",") if part.strip()]
    faults = ShellFaults(options.fault or [], options.every)
    run = Run(_load(options), endpoints, progress)
    await run.run(faults, iter(()), len(options.fault or []))
    run.findings.problems += [f"--fault: {failure}" for failure in faults.failures]
    return run.findings


def _load(options: ChaosOptions) -> Load:
    from outrider.chaos.run import Load

    return Load(
        generations=options.generations,
        concurrent=options.concurrent,
        seed=options.seed,
        max_tokens=options.max_tokens,
        # A reference for each costs one plain output of the greatest length.
        num_cases=min(48, 6 + options.generations // 12),
    )


def _stack_options(options: ChaosOptions) -> StackOptions:
    own = StackOptions(
        target=options.target,
        draft=options.draft,
        inflate="0",
        device=options.device,
        # Exactness is a statement about float32; at lower precision batches round otherwise.
        dtype="auto" if options.simulate else "float32",
        kv_cache_tokens=options.kv_cache_tokens,
        simulate_target=_SIMULATED_TARGET if options.simulate else None,
        simulate_draft=_SIMULATED_DRAFT if options.simulate else None,
        target_threads=1,
        max_generations=max(256, 2 * options.concurrent),
    )
    return kept_to_itself(own)


class _Logs:
    """The programs' logs: kept where `keeps` is set, or the run could not be ended."""

    def __init__(self, out: Path) -> None:
        self.path = out / "logs"
        self.keeps = False

    def __enter__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {self.path}: {error.strerror or error}") from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_failure = kind is not None and issubclass(kind, OutriderError)
        if not self.keeps and (not is_failure or kind is ConfigError):
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # something is in it
                self.path.parent.rmdir()


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    from outrider.chaos.run import STOPPED

    columns = (TextColumn("[dim]{task.description}[/]"), BarColumn(), MofNCompleteColumn())
    shows = console.is_terminal
    with Bars(
        *columns,
        TimeElapsedColumn(),
        TextColumn("[dim]left[/]"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not shows,
    ) as bars:
        task, last = bars.add_task("", total=None), ""

        def progress(what: str, num_done: int, total: int) -> None:
            nonlocal last
            if what.startswith(STOPPED):
                console.print(what, markup=False, highlight=False, soft_wrap=True)
            elif what != last and not shows:
                console.print(f"{what} …", style="dim", highlight=False)
            last = what
            bars.update(task, description=what, completed=num_done, total=total)

        yield progress


def _command() -> str:
    return shlex.join(["outrider", *sys.argv[1:]])


def _write(options: ChaosOptions, summary: Summary) -> None:
    from outrider.chaos.report import inserted, markdown
    from outrider.cli.bench.document import git_commit, machine, versions

    options.out.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {
        "command": _command(),
        "date": date,
        "git_commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        **summary.to_dict(),
    }
    text = json.dumps(told, indent=2, ensure_ascii=False)
    (options.out / "chaos.json").write_text(f"{text}\n", "utf-8")
    about = {"date, commit": f"{date}, {git_commit()}"}
    part = markdown(summary, _command(), about)
    (options.out / "chaos.md").write_text(f"{part}\n", "utf-8")
    if options.report is not None:
        page = options.report.read_text("utf-8") if options.report.exists() else ""
        options.report.write_text(inserted(page, part), "utf-8")


def _tell(console: Console, options: ChaosOptions, summary: Summary, log_dir: Path) -> None:
    from rich.markup import escape

    from outrider.chaos.report import first
    from outrider.cli.bench.show import number, table

    shown = table("faults", ("fault", "times", "streams on it", "next token p50 s", "longest s"))
    for row in summary.faults:
        waits = (number(row.wait_p50_s), number(row.wait_max_s))
        shown.add_row(row.name, str(row.num_times), str(row.num_streams), *waits)
    console.print(shown)
    console.print(
        f"{summary.num_generations} generations, {summary.num_tokens} tokens, "
        f"{summary.num_faults} faults in {summary.duration_s:.0f} s; {summary.num_resumes} resumed",
        highlight=False,
    )
    for what in first(summary.problems, _NUM_TOLD):
        console.print(f"[bold red]✘[/] {escape(what)}", soft_wrap=True, highlight=False)
    if summary.problems:
        console.print(f"[dim]logs: {log_dir}[/]", soft_wrap=True, highlight=False)
    else:
        console.print("[green]✔[/] nothing lost, repeated or different", highlight=False)
    console.print(f"[dim]{options.out / 'chaos.json'}[/]", soft_wrap=True, highlight=False)
