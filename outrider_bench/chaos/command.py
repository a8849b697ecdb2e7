"""`outrider chaos`: load under faults, on a system of its own or on running orchestrators.

Owns the flags and the result files. `view` owns the terminal output.
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
from outrider.cli.stack_options import StackOptions, private_stack
from outrider.errors import ConfigError, OutriderError

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.failures import Signalled
    from outrider_bench.chaos.report import Summary
    from outrider_bench.chaos.run import Findings, LoadSettings, Progress

# Simulated tiers: every output is a pure function of its context. All but the engine is tested.
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
    """Flags of `outrider chaos`."""

    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Running orchestrators, host:port,host:port. Default: start a system for the run."
        ),
    ] = None
    fault: Annotated[
        list[str] | None,
        typer.Option(help="With --endpoint: shell command that injects a fault. Repeatable."),
    ] = None
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two --fault commands.")] = (
        30.0
    )
    generations: Annotated[int, typer.Option(min=1, help="Least number of generations.")] = 1000
    concurrent: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 32
    max_tokens: Annotated[int, typer.Option(min=2, help="Greatest output length, in tokens.")] = 300
    seed: Annotated[int, typer.Option(help="Seed of requests, client behaviour and faults.")] = 0
    faults: Annotated[
        str,
        typer.Option(
            help="all, quick, none, or a list: draft,redis-kill,freeze. Each occurs at least once."
        ),
    ] = "all"
    gap: Annotated[
        float, typer.Option(min=0.05, help="Mean seconds between the starts of two faults.")
    ] = 1.5
    longest: Annotated[
        float, typer.Option(min=0.1, help="Longest duration of a fault, in seconds.")
    ] = 5.0
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate the model tiers; everything else is real.")
    ] = False
    target: Annotated[
        str | None,
        typer.Option(
            help="Target model: local directory or Hub name. Default: the quickstart target."
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft model: local directory or Hub name. Default: the quickstart draft."
        ),
    ] = None
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto"
    kv_cache_tokens: Annotated[
        int, typer.Option(help="KV cache size of each model service, in tokens.")
    ] = 32_768
    out: Annotated[Path, typer.Option(help="Directory for chaos.json and chaos.md.")] = Path(
        "chaos-results"
    )
    report: Annotated[
        Path | None,
        typer.Option(help="Markdown page whose marked section is replaced by the report."),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Short run.")] = False

    def with_quick_defaults(self) -> ChaosOptions:
        """Options with the shorter defaults of --quick, if it is given."""
        if not self.quick:
            return self
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{k: v for k, v in _QUICK.items() if getattr(self, k) == defaults[k]})


@takes(ChaosOptions)
def chaos(options: ChaosOptions) -> None:
    """Inject faults into a system under load; check that no token is lost, repeated or changed.

    By default it starts a system: two replicas of each tier, two orchestrators, a Redis.
    """
    from rich.console import Console

    from outrider.cli.running import run
    from outrider_bench.chaos.report import summarise
    from outrider_bench.chaos.run import Findings
    from outrider_bench.chaos.view import announce, progress, show_summary

    options = options.with_quick_defaults()
    console, logs, findings = Console(), _Logs(options.out), Findings()
    announce(console, options.generations, options.concurrent, _faults_s(options))
    with logs:
        with progress(console, options.concurrent) as progress_bar:
            stopped = run(_interruptible(options, logs.path, progress_bar, findings))
        summary = summarise(findings)
        logs.keeps = bool(summary.problems)
    _write(options, summary, console)
    show_summary(console, summary, logs.path, options.out / _JSON)
    if stopped is not None:
        raise stopped
    raise typer.Exit(1 if summary.problems else 0)


async def _interruptible(
    options: ChaosOptions, log_dir: Path, progress_bar: Progress, findings: Findings
) -> Signalled | None:
    """Runs the test into `findings`. Returns the signal that ended it, if there are results."""
    from outrider.cli.running import survive_signal

    try:
        await _run(options, log_dir, progress_bar, findings)
    except asyncio.CancelledError:
        if not findings.streams:
            raise
        return survive_signal()
    return None


def _fault_names(options: ChaosOptions) -> Sequence[str]:
    """Names of the chosen faults. Raises ConfigError."""
    from outrider_bench.chaos.faults import FAULTS, QUICK_FAULTS, parse_faults

    named = {"all": FAULTS, "quick": QUICK_FAULTS, "none": ()}.get(options.faults)
    return parse_faults(options.faults) if named is None else named


def _faults_s(options: ChaosOptions) -> float:
    """Expected seconds until every fault has occurred once."""
    if options.endpoint is not None:
        return options.every * len(options.fault or [])
    return options.gap * len(_fault_names(options))


async def _run(
    options: ChaosOptions, log_dir: Path, progress_bar: Progress, findings: Findings
) -> None:
    from outrider_bench.chaos.own_system import FaultPlan, run_on_own_system

    if options.endpoint is not None:
        await _run_on_endpoints(options, progress_bar, findings)
        return
    if options.fault:
        raise ConfigError("--fault: requires --endpoint; otherwise use --faults")
    names = tuple(_fault_names(options))
    plan = FaultPlan(names, options.gap, options.longest, is_once=options.quick)
    stack_options = _stack_options(options)
    await run_on_own_system(_load(options), plan, stack_options, log_dir, progress_bar, findings)


async def _run_on_endpoints(
    options: ChaosOptions, progress_bar: Progress, findings: Findings
) -> None:
    from outrider_bench.chaos.run import ChaosRun
    from outrider_bench.chaos.shell import ShellFaults

    assert options.endpoint is not None, "checked by the caller"
    endpoints = [part.strip() for part in options.endpoint.split(",") if part.strip()]
    faults = ShellFaults(options.fault or [], options.every)
    try:
        run = ChaosRun(_load(options), endpoints, progress_bar, findings)
        await run.run(faults, iter(()), len(options.fault or []))
    finally:
        findings.problems += [f"--fault: {failure}" for failure in faults.failures]


def _load(options: ChaosOptions) -> LoadSettings:
    from outrider_bench.chaos.run import LoadSettings

    return LoadSettings(
        generations=options.generations,
        concurrent=options.concurrent,
        seed=options.seed,
        max_tokens=options.max_tokens,
        # Each case costs one reference output of the greatest length.
        num_cases=min(48, 6 + options.generations // 12),
    )


def _stack_options(options: ChaosOptions) -> StackOptions:
    stack = StackOptions(
        target=options.target,
        draft=options.draft,
        inflate="0",
        device=options.device,
        # Outputs are compared token for token: at lower precision other batch shapes round
        # differently.
        dtype="auto" if options.simulate else "float32",
        kv_cache_tokens=options.kv_cache_tokens,
        simulate_target=_SIMULATED_TARGET if options.simulate else None,
        simulate_draft=_SIMULATED_DRAFT if options.simulate else None,
        target_threads=1,
        max_generations=max(256, 2 * options.concurrent),
    )
    return private_stack(stack)


class _Logs:
    """Directory of the programs' logs. Deleted at the end unless `keeps` or a program failed."""

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
            with contextlib.suppress(OSError):  # it is not empty
                self.path.parent.rmdir()


def _command() -> str:
    return shlex.join(["outrider", *sys.argv[1:]])


def _write(options: ChaosOptions, summary: Summary, console: Console) -> None:
    from outrider_bench.chaos.report import insert_section, markdown
    from outrider_bench.measuring.document import git_commit, machine, versions

    options.out.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    document = {
        "command": _command(),
        "date": date,
        "git_commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        **summary.to_dict(),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (options.out / _JSON).write_text(f"{text}\n", "utf-8")
    about = {"date, commit": f"{date}, {git_commit()}"}
    section = markdown(summary, _command(), about)
    (options.out / "chaos.md").write_text(f"{section}\n", "utf-8")
    if options.report is not None and summary.is_cut:
        console.print(f"{options.report}: unchanged because the run was interrupted", markup=False)
    elif options.report is not None:
        page = options.report.read_text("utf-8") if options.report.exists() else ""
        options.report.write_text(insert_section(page, section), "utf-8")
