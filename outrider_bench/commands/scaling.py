"""`outrider bench scaling`: how many draft replicas a target takes, all of them simulated.

Owns the start of the tiers and the order of trials; what is tried is in `trials`. An orchestrator
has one target and one draft endpoint; so two draft replicas for one target are two orchestrators
on it, each with a draft replica and half of the sessions.
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
# A trial is of so many outputs' tokens at least.
_MIN_OUTPUTS = 4


@dataclass(frozen=True)
class ScalingOptions(BenchOptions):
    pass_ms: Annotated[
        float, typer.Option(min=25, help="A target pass. Below 25 ms Python is what is measured.")
    ] = 80.0
    ratios: Annotated[str, typer.Option(help="Draft step over target pass, c.")] = "0.05,0.1,0.2"
    alphas: Annotated[str, typer.Option(help="Share of draft tokens that stand.")] = "0.6,0.8"
    round_trips: Annotated[str, typer.Option(help="Milliseconds to the draft and back.")] = "0,40"
    sessions: Annotated[str, typer.Option(help="Sessions at a time, in all.")] = "1,4,16"
    drafts: Annotated[str, typer.Option(help="Draft replicas for the one target.")] = "1,2"
    cores: Annotated[CoreUse, typer.Option(help="Simulated passes need none.")] = CoreUse.shared
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of an output; alone up to 4 ×.")
    ] = 96
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all is measured.")] = 1
    name: Annotated[str, typer.Option(help="Of the files.")] = "scaling"


@takes(ScalingOptions)
def scaling(options: ScalingOptions) -> None:
    """Tokens/s and how busy the tiers are, for each ratio, acceptance, round trip and load.

    All tiers are simulated: nothing here says how fast a model is.
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
                f"--{name.replace('_', '-')}: the tiers are simulated by this command"
            )
    numbers = parse_list(options.drafts, "--drafts", int)
    if not 1 <= min(numbers) <= max(numbers) <= _MAX_DRAFTS:
        raise ConfigError(f"--drafts: {options.drafts!r}: 1 to {_MAX_DRAFTS} replicas")
    if min(parse_list(options.sessions, "--sessions", int)) < 1:
        raise ConfigError(f"--sessions: {options.sessions!r}: 1 or more")
    if max(parse_list(options.alphas, "--alphas", float)) > 1:
        raise ConfigError(f"--alphas: {options.alphas!r}: 0 to 1")
    for name in ("ratios", "round_trips"):
        parse_list(getattr(options, name), f"--{name.replace('_', '-')}", float)


def trials(options: ScalingOptions, ratio: float, alpha: float) -> list[Trial]:
    """Of one pair of tiers; plain decoding first. No more replicas than sessions."""
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
            async with _lanes(options, pair, console) as lanes:
                document.about(lanes[0])
                measured: dict[Trial, list[Run]] = {}
                try:
                    await _measure_pair(options, pair, lanes, document, step, measured)
                finally:  # also of a part
                    outcomes += summarised(options.pass_ms, measured)
    return outcomes


@contextlib.asynccontextmanager
async def _lanes(
    options: ScalingOptions, pair: tuple[float, float], console: Console
) -> AsyncIterator[list[System]]:
    """Orchestrators with a draft replica each, all on the first one's target."""
    from outrider.cli.up import shown_stack
    from outrider.cli.view import StackView
    from outrider.client.client import connected
    from outrider_bench.measuring.workload import Prompts

    target, draft = simulated_tiers(options.pass_ms, *pair)
    layout = core_per_tier(options.cores)
    lanes: list[System] = []
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
            address = lanes[0].stack.addresses["target"] if lanes else None
            shown = shown_stack(stack_options, StackView(console, stays=False), address)
            stack = await resources.enter_async_context(shown)
            client = await resources.enter_async_context(connected(stack.endpoint))
            info = await client.model_info()
            prompts = Prompts(
                info.target.vocab_size, tokenizer=None, seed=number, length=options.prompt_len
            )
            lanes.append(System(client, stack, info, prompts, layout))
        yield lanes


async def _measure_pair(
    options: ScalingOptions,
    pair: tuple[float, float],
    lanes: Sequence[System],
    document: Document,
    step: Step,
    measured: dict[Trial, list[Run]],
) -> None:
    """Adds to `measured`."""
    from outrider_bench.commands.busy import BusyWatch
    from outrider_bench.measuring.load import interleaved

    pids = {f"draft {number}": lane.stack.pid("draft") for number, lane in enumerate(lanes)}
    async with BusyWatch(pids | {"target": lanes[0].stack.pid("target")}) as watch:
        for repetition, trial in interleaved(trials(options, *pair), options.repetitions):
            step(trial.name)
            one = await _run(options, trial, lanes, watch, repetition)
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
    lanes: Sequence[System],
    watch: BusyWatch,
    repetition: int,
) -> Run:
    """A warm-up, in which the choice of γ learns what the trial costs, and the outputs."""
    used = lanes[: max(1, trial.num_drafts)]
    for lane in used:
        assert lane.stack.relay is not None, "it was started with a delay"
        lane.stack.relay.delay_s = trial.round_trip_ms / 2000
    # Few sessions go on for longer, that luck averages out; plain decoding has none.
    num_tokens = options.max_tokens * max(1, _MIN_OUTPUTS // trial.num_sessions)
    warm_up = _NUM_WARM_UP_TOKENS
    if trial.num_drafts == 0:
        warm_up, num_tokens = 2, max(2, options.max_tokens // 4)
    await _blocks(trial, used, warm_up, repetition)
    passes = await _passes(lanes[0])
    begin = time.monotonic()
    blocks = await _blocks(trial, used, num_tokens, repetition)
    rows, steps = (b - a for a, b in zip(passes, await _passes(lanes[0]), strict=True))
    samples = [sample for block in blocks for sample in block.samples]
    # While all of them were at it: they began together. On a machine that stalls that may be no
    # time at all, and it is of the whole.
    first = begin + max(sample.first_s for sample in samples)
    last = begin + min(sample.wall_s for sample in samples)
    if not watch.has_looked(first, last):
        first, last = begin, time.monotonic()
    names = ["target", *(f"draft {number}" for number in range(trial.num_drafts))]
    busy = {name: watch.share(name, first, last) for name in names}
    return Run(blocks, busy, rows / max(1, steps))


async def _passes(lane: System) -> tuple[int, int]:
    """Rows and passes of the target so far."""
    from outrider_bench.measuring.tiers import target_info

    load = (await target_info(lane.stack.addresses["target"])).load
    return load.num_rows_total, load.num_steps_total


async def _blocks(
    trial: Trial, used: Sequence[System], max_tokens: int, repetition: int
) -> list[Block]:
    """One output for each session, the sessions dealt out to the lanes."""
    from outrider_bench.measuring.load import Work, run_block

    variant = _variant(trial)
    works: list[list[Work]] = [[] for _ in used]
    for number in range(trial.num_sessions):
        lane = number % len(used)
        ids = used[lane].prompts.ids(number)
        works[lane].append(Work(variant, number, ids, max_tokens, repetition, seed=number))
    return await asyncio.gather(
        *(run_block(lane, own, len(own)) for lane, own in zip(used, works, strict=True))
    )


def _variant(trial: Trial) -> Variant:
    from outrider_bench.measuring.workload import adaptive, plain

    return replace(adaptive() if trial.num_drafts else plain(), name=trial.name)
