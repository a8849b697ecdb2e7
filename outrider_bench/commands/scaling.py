"""`outrider bench scaling`: simulated draft replicas per target.

Owns the start of the tiers and the order of trials; the trials are defined in `trials`. N draft
replicas for one target are N orchestrators on that target. Each has one draft replica and an equal
share of the sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import parse_list, takes
from outrider.errors import ConfigError
from outrider_bench.commands.trials import (
    Outcome,
    Run,
    Trial,
    panels,
    result,
    simulated_tiers,
    summarised,
    table,
)
from outrider_bench.measuring.cores import CoreUse, core_per_tier
from outrider_bench.measuring.system import BenchOptions, System

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.commands.busy import BusyWatch
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.show import Step
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 32
_MAX_DRAFTS = 4
# A trial generates at least the tokens of this many outputs.
_MIN_OUTPUTS = 4


@dataclass(frozen=True)
class ScalingOptions(BenchOptions):
    """Flags of `outrider bench scaling`."""

    pass_ms: Annotated[
        float,
        typer.Option(min=25, help="Duration of a target pass; below 25 ms, Python dominates."),
    ] = 80.0
    ratios: Annotated[str, typer.Option(help="Duration of a draft step over a target pass, c.")] = (
        "0.05,0.1,0.2"
    )
    alphas: Annotated[str, typer.Option(help="Acceptance rates.")] = "0.6,0.8"
    round_trips: Annotated[
        str, typer.Option(help="Network round trips to the draft, in milliseconds.")
    ] = "0,40"
    sessions: Annotated[str, typer.Option(help="Total numbers of concurrent sessions.")] = "1,4,16"
    drafts: Annotated[str, typer.Option(help="Numbers of draft replicas for one target.")] = "1,2"
    cores: Annotated[
        CoreUse, typer.Option(help="shared: no pinning; simulated passes need no core.")
    ] = CoreUse.shared
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens per output; up to 4 times as many with few sessions.")
    ] = 96
    repetitions: Annotated[int, typer.Option(min=1, help="Repetitions of every measurement.")] = 1
    name: Annotated[str, typer.Option(help="Name of the files.")] = "scaling"


@takes(ScalingOptions)
def scaling(options: ScalingOptions) -> None:
    """Measure tokens/s and utilization of the tiers by cost ratio, acceptance, round trip and load.

    All tiers are simulated: the results say nothing about the speed of real models.
    """
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    _check(options)
    options = options.with_quick_defaults(
        ratios="0.1", alphas="0.8", round_trips="0", sessions="1,2"
    )
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    outcomes = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [result(outcome) for outcome in outcomes]
        document.write()
        draw(document.plot_path, "Draft replicas for one target", panels(outcomes))
        finish(console, document, [table(outcomes)])


def _check(options: ScalingOptions) -> None:
    for name in ("target", "draft", "inflate", "simulate_target", "simulate_draft"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}: not allowed: this command simulates the tiers"
            )
    numbers = parse_list(options.drafts, "--drafts", int)
    if not 1 <= min(numbers) <= max(numbers) <= _MAX_DRAFTS:
        raise ConfigError(f"--drafts: {options.drafts!r} is out of range: 1 to {_MAX_DRAFTS}")
    if min(parse_list(options.sessions, "--sessions", int)) < 1:
        raise ConfigError(f"--sessions: {options.sessions!r} is out of range: at least 1")
    if max(parse_list(options.alphas, "--alphas", float)) > 1:
        raise ConfigError(f"--alphas: {options.alphas!r} is out of range: 0 to 1")
    for name in ("ratios", "round_trips"):
        parse_list(getattr(options, name), f"--{name.replace('_', '-')}", float)


def trials(options: ScalingOptions, ratio: float, alpha: float) -> list[Trial]:
    """Trials of one pair of tiers; plain decoding first. Never more replicas than sessions."""
    sessions = parse_list(options.sessions, "--sessions", int)
    drafts = parse_list(options.drafts, "--drafts", int)
    round_trips = parse_list(options.round_trips, "--round-trips", float)
    plain = [Trial(ratio, alpha, round_trips[0], num, 0) for num in sessions]
    return plain + [
        Trial(ratio, alpha, round_trip_ms, num, num_drafts)
        for round_trip_ms in round_trips
        for num in sessions
        for num_drafts in drafts
        if num_drafts <= num
    ]


async def _measure(options: ScalingOptions, console: Console, document: Document) -> list[Outcome]:
    from outrider_bench.measuring.show import progress

    pairs = [
        (ratio, alpha)
        for alpha in parse_list(options.alphas, "--alphas", float)
        for ratio in parse_list(options.ratios, "--ratios", float)
    ]
    num_steps = options.repetitions * sum(len(trials(options, *pair)) for pair in pairs)
    outcomes: list[Outcome] = []
    with progress(console, num_steps, document, outcomes) as step:
        for pair in pairs:
            async with _systems(options, pair, console) as systems:
                document.about(systems[0])
                measured: dict[Trial, list[Run]] = {}
                try:
                    await _measure_pair(options, pair, systems, document, step, measured)
                finally:  # also of a part
                    outcomes += summarised(options.pass_ms, measured)
    return outcomes


@contextlib.asynccontextmanager
async def _systems(
    options: ScalingOptions, pair: tuple[float, float], console: Console
) -> AsyncIterator[list[System]]:
    """Starts the orchestrators, each with one draft replica, all on the first one's target."""
    from outrider.cli.up import shown_stack
    from outrider.cli.view import StackView
    from outrider.client import AsyncClient
    from outrider_bench.measuring.workload import Prompts

    target, draft = simulated_tiers(options.pass_ms, *pair)
    layout = core_per_tier(options.cores)
    systems: list[System] = []
    async with contextlib.AsyncExitStack() as resources:
        resources.enter_context(layout.pins_this_process())
        for number in range(max(parse_list(options.drafts, "--drafts", int))):
            stack_options = options.stack_options(
                layout,
                simulate_target=str(target),
                simulate_draft=str(draft),
                draft_delay_ms=0.0,
                log_dir=options.out / "logs" / str(number),
            )
            address = systems[0].stack.addresses["target"] if systems else None
            shown = shown_stack(stack_options, StackView(console, stays=False), address)
            stack = await resources.enter_async_context(shown)
            client = await resources.enter_async_context(
                AsyncClient(stack.endpoint, resume_for_s=0.0)
            )
            info = await client.models()
            prompts = Prompts(
                info.target.vocab_size, tokenizer=None, seed=number, length=options.prompt_len
            )
            systems.append(System(client, stack, info, prompts, layout))
        yield systems


async def _measure_pair(
    options: ScalingOptions,
    pair: tuple[float, float],
    systems: Sequence[System],
    document: Document,
    step: Step,
    measured: dict[Trial, list[Run]],
) -> None:
    """Runs all trials of a pair of tiers. Appends to `measured`."""
    from outrider_bench.commands.busy import BusyWatch
    from outrider_bench.measuring.load import interleaved

    pids = {f"draft {number}": system.stack.pid("draft") for number, system in enumerate(systems)}
    async with BusyWatch(pids | {"target": systems[0].stack.pid("target")}) as watch:
        for repetition, trial in interleaved(trials(options, *pair), options.repetitions):
            step(trial.name)
            one = await _run(options, trial, systems, watch, repetition)
            measured.setdefault(trial, []).append(one)
            document.samples += [
                asdict(trial)
                | {"busy": one.busy, "rows_per_pass": one.rows_per_pass}
                | block.to_dict()
                for block in one.blocks
            ]


async def _run(
    options: ScalingOptions,
    trial: Trial,
    systems: Sequence[System],
    watch: BusyWatch,
    repetition: int,
) -> Run:
    """Runs a warm-up, in which adaptive γ measures the costs of the trial, and then the outputs."""
    used = systems[: max(1, trial.num_drafts)]
    for system in used:
        assert system.stack.relay is not None, "it was started with a delay"
        system.stack.relay.delay_s = trial.round_trip_ms / 2000
    # Few sessions run longer, to average out random acceptance; plain decoding has none.
    num_tokens = options.max_tokens * max(1, _MIN_OUTPUTS // trial.num_sessions)
    warm_up = _NUM_WARM_UP_TOKENS
    if trial.num_drafts == 0:
        warm_up, num_tokens = 2, max(2, options.max_tokens // 4)
    await _blocks(trial, used, warm_up, repetition)
    passes = await _passes(systems[0])
    begin = time.monotonic()
    blocks = await _blocks(trial, used, num_tokens, repetition)
    rows, steps = (b - a for a, b in zip(passes, await _passes(systems[0]), strict=True))
    samples = [sample for block in blocks for sample in block.samples]
    # The window in which all sessions were generating; they began together. On a stalled machine it
    # may contain no samples; then the whole time counts.
    first = begin + max(sample.first_s for sample in samples)
    last = begin + min(sample.wall_s for sample in samples)
    if not watch.has_samples(first, last):
        first, last = begin, time.monotonic()
    names = ["target", *(f"draft {number}" for number in range(trial.num_drafts))]
    busy = {name: watch.share(name, first, last) for name in names}
    return Run(blocks, busy, rows / max(1, steps))


async def _passes(system: System) -> tuple[int, int]:
    """Verify requests and passes of the target so far."""
    from outrider_bench.measuring.tiers import target_info

    load = (await target_info(system.stack.addresses["target"])).load
    return load.num_rows_total, load.num_steps_total


async def _blocks(
    trial: Trial, used: Sequence[System], max_tokens: int, repetition: int
) -> list[Block]:
    """Runs one output for each session; sessions are distributed over the systems."""
    from outrider_bench.measuring.load import Work, run_block

    variant = _variant(trial)
    works: list[list[Work]] = [[] for _ in used]
    for number in range(trial.num_sessions):
        index = number % len(used)
        ids = used[index].prompts.ids(number)
        works[index].append(Work(variant, number, ids, max_tokens, repetition, seed=number))
    return await asyncio.gather(
        *(run_block(system, own, len(own)) for system, own in zip(used, works, strict=True))
    )


def _variant(trial: Trial) -> Variant:
    from outrider_bench.measuring.workload import adaptive, plain

    return replace(adaptive() if trial.num_drafts else plain(), name=trial.name)
