"""`outrider chaos`: load under faults on a system of its own, or on yours, and what came of it.

Owns the flags and the files. What is shown is for `chaos_view`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
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

    from outrider.cli.failures import Signalled
    from outrider_bench.chaos.report import Summary
    from outrider_bench.chaos.run import Findings, Load, Progress

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
_JSON = "chaos.json"


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

    from outrider.cli.running import run
    from outrider_bench.chaos.report import summarised
    from outrider_bench.chaos.run import Findings
    from outrider_bench.chaos.view import announce, progress, show_summary

    options = options.quickened()
    console, logs, findings = Console(), _Logs(options.out), Findings()
    announce(console, options.generations, options.concurrent, _faults_s(options))
    with logs:
        with progress(console, options.concurrent) as shown:
            stopped = run(_stoppable(options, logs.path, shown, findings))
        summary = summarised(findings)
        logs.keeps = bool(summary.problems)
    _write(options, summary, console)
    show_summary(console, summary, logs.path, options.out / _JSON)
    if stopped is not None:
        raise stopped
    raise typer.Exit(1 if summary.problems else 0)


async def _stoppable(
    options: ChaosOptions, log_dir: Path, shown: Progress, findings: Findings
) -> Signalled | None:
    """Adds to `findings`; the signal that has ended it, once there is anything to report."""
    from outrider.cli.running import survive_signal

    try:
        await _run(options, log_dir, shown, findings)
    except asyncio.CancelledError:
        if not findings.streams:
            raise
        return survive_signal()
    return None


def _fault_names(options: ChaosOptions) -> Sequence[str]:
    """Raises ConfigError."""
    from outrider_bench.chaos.faults import FAULTS, QUICK_FAULTS, parse_faults

    named = {"all": FAULTS, "quick": QUICK_FAULTS, "none": ()}.get(options.faults)
    return parse_faults(options.faults) if named is None else named


def _faults_s(options: ChaosOptions) -> float:
    """Until every sort of fault has happened once, about."""
    if options.endpoint is not None:
        return options.every * len(options.fault or [])
    return options.gap * len(_fault_names(options))


async def _run(options: ChaosOptions, log_dir: Path, shown: Progress, findings: Findings) -> None:
    from outrider_bench.chaos.own import Disturbance, run_on_own

    if options.endpoint is not None:
        await _run_on_yours(options, shown, findings)
        return
    if options.fault:
        raise ConfigError("--fault: only with --endpoint; faults of an own system are --faults")
    names = tuple(_fault_names(options))
    disturbance = Disturbance(names, options.gap, options.longest, is_once=options.quick)
    stack_options = _stack_options(options)
    await run_on_own(_load(options), disturbance, stack_options, log_dir, shown, findings)


async def _run_on_yours(options: ChaosOptions, shown: Progress, findings: Findings) -> None:
    from outrider_bench.chaos.run import Run
    from outrider_bench.chaos.shell import ShellFaults

    assert options.endpoint is not None, "it was given"
    endpoints = [part.strip() for part in options.endpoint.split(",") if part.strip()]
    faults = ShellFaults(options.fault or [], options.every)
    try:
        run = Run(_load(options), endpoints, shown, findings)
        await run.run(faults, iter(()), len(options.fault or []))
    finally:
        findings.problems += [f"--fault: {failure}" for failure in faults.failures]


def _load(options: ChaosOptions) -> Load:
    from outrider_bench.chaos.run import Load

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


def _command() -> str:
    return shlex.join(["outrider", *sys.argv[1:]])


def _write(options: ChaosOptions, summary: Summary, console: Console) -> None:
    from outrider_bench.chaos.report import inserted, markdown
    from outrider_bench.measuring.document import git_commit, machine, versions

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
    (options.out / _JSON).write_text(f"{text}\n", "utf-8")
    about = {"date, commit": f"{date}, {git_commit()}"}
    part = markdown(summary, _command(), about)
    (options.out / "chaos.md").write_text(f"{part}\n", "utf-8")
    if options.report is not None and summary.is_cut:
        console.print(f"{options.report}: unchanged, as the run was interrupted", markup=False)
    elif options.report is not None:
        page = options.report.read_text("utf-8") if options.report.exists() else ""
        options.report.write_text(inserted(page, part), "utf-8")
