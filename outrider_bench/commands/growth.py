"""`outrider bench growth`: throughput and pass time by context, sessions, γ or vocabulary.

One parameter varies, the others stay fixed. Every point runs with and without drafts, interleaved.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_count, takes
from outrider.errors import ConfigError
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.load import Block, Work
    from outrider_bench.measuring.plots import Panel
    from outrider_bench.measuring.show import Step
    from outrider_bench.measuring.summary import Rounds
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 16
# The server's default, unless a point needs more.
_MIN_MAX_GAMMA = 16


class Over(StrEnum):
    """Values of `--over`: the parameter that varies."""

    context = "context"
    sessions = "sessions"
    gamma = "gamma"
    vocabulary = "vocabulary"


_POINTS = {
    Over.context: "256,512,1024,2048,4096,8192",
    Over.sessions: "1,2,4,8,16,32,64",
    Over.gamma: "0,1,2,3,4,6,8,12,16",
    Over.vocabulary: "4K,8K,16K,32K,64K,128K,152K",
}
# They give α of about 0.8 at the default vocabulary of each size. With other vocabularies α
# differs; the table shows it.
_EPSILONS = {"p1": 0.02294, "p2": 0.01562, "tiny": 0.2}
_QUICK_POINTS = {
    Over.context: "32,64",
    Over.sessions: "1,2",
    Over.gamma: "0,2",
    Over.vocabulary: "512,1024",
}
_LABELS = {
    Over.context: "tokens of context",
    Over.sessions: "sessions",
    Over.gamma: "draft tokens per round (γ)",
    Over.vocabulary: "vocabulary",
}


@dataclass(frozen=True)
class GrowthOptions(BenchOptions):
    """Flags of `outrider bench growth`."""

    over: Annotated[Over, typer.Option(help="Parameter that varies.")] = Over.context
    points: Annotated[
        str | None,
        typer.Option(
            help="Values of the parameter: 256,1024. Default: those of the documented results."
        ),
    ] = None
    pair_size: Annotated[
        str, typer.Option(help="Size of the pairs made for --over vocabulary: tiny, p1 or p2.")
    ] = "p1"
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0


@dataclass(frozen=True)
class Point:
    """A table row: one variant at one value of the parameter."""

    variant: str
    value: int
    tokens_per_s: float
    least: float
    most: float
    first_s: float
    rounds: Rounds


@takes(GrowthOptions)
def growth(options: GrowthOptions) -> None:
    """Measure tokens/s and the duration of target passes while one parameter grows."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    over = options.over
    options = options.with_quick_defaults(points=_QUICK_POINTS[over], pair_size="tiny")
    require_matplotlib()
    console, document = bench_console(), Document(f"growth-{over}", options)
    blocks = run(_measure(options, console, document))
    document.samples += [{over.value: value} | block.to_dict() for value, block in blocks]
    with reporting(console, document):
        points_made = _summarised(blocks)
        document.results += [asdict(point) for point in points_made]
        document.write()
        title = f"Growth with {_LABELS[over]}"
        draw(document.plot_path, title, _panels(over, points_made))
        finish(console, document, [_table(over, points_made)])


async def _measure(
    options: GrowthOptions, console: Console, document: Document
) -> list[tuple[int, Block]]:
    from outrider_bench.measuring.show import progress

    text = options.points or _POINTS[options.over]
    values = sorted(parse_count(part, "--points") for part in text.split(","))
    if options.over is Over.vocabulary and options.target is not None:
        raise ConfigError(
            "--over vocabulary: cannot be combined with --target; it makes its own pairs"
        )
    ways = _ways(options)
    num_steps = len(values) * len(ways) * (options.repetitions + 1)
    blocks: list[tuple[int, Block]] = []
    num_first = len(ways) * (1 if options.over is Over.vocabulary else len(values))
    warm_up = (num_first, max(1, options.max_tokens / _NUM_WARM_UP_TOKENS) * options.prompts)
    with progress(console, num_steps, document, blocks, warm_up=warm_up) as step:
        async with contextlib.aclosing(_systems(options, values, console)) as systems:
            async for system, own in systems:
                system.require_draft()
                document.about(system)
                await _measure_in(system, options, own, step, blocks)
    return blocks


async def _systems(
    options: GrowthOptions, values: list[int], console: Console
) -> AsyncGenerator[tuple[System, list[int]], None]:
    """Systems, each with its values: one for all values, or one for each vocabulary."""
    if options.over is not Over.vocabulary:
        changes: dict[str, Any] = {}
        if options.over is Over.sessions:
            changes["max_generations"] = max(256, *values)
        if options.over is Over.gamma:
            changes["max_gamma"] = max(_MIN_MAX_GAMMA, *values)
        async with measured_system(options, console, **changes) as system:
            yield system, values
        return
    from outrider_bench.commands.pair import PairOptions, made_pair

    for value in values:
        with tempfile.TemporaryDirectory(prefix="outrider-pair-") as folder:
            directory = Path(folder)
            with console.status(f"making a pair with {value} tokens"):
                epsilon = _EPSILONS.get(options.pair_size)
                await made_pair(
                    PairOptions(directory, options.pair_size, epsilon=epsilon, vocab_size=value)
                )
            target, draft = str(directory / "target"), str(directory / "draft")
            made = replace(options, target=target, draft=draft, inflate="0")
            async with measured_system(made, console) as system:
                yield system, [value]


def _ways(options: GrowthOptions) -> list[Variant]:
    from outrider_bench.measuring.workload import adaptive, fixed, plain

    temperature = options.temperature
    if options.over is Over.gamma:
        return [replace(fixed(0, temperature), name="fixed γ")]
    return [plain(temperature), adaptive(temperature)]


async def _measure_in(
    system: System,
    options: GrowthOptions,
    values: list[int],
    step: Step,
    blocks: list[tuple[int, Block]],
) -> None:
    """Measures all values on a system. Appends to `blocks`."""
    from outrider_bench.measuring.load import interleaved, run_block

    work = [(value, way) for value in values for way in _ways(options)]
    for value, way in work:
        step(f"warm-up: {way.name}, {value}")
        warm_up = _works(system, options, value, way)[:1]
        await run_block(system, [replace(w, max_tokens=_NUM_WARM_UP_TOKENS) for w in warm_up], 1)
    for repetition, (value, way) in interleaved(work, options.repetitions):
        step(f"{way.name}, {value}")
        works = [replace(w, repetition=repetition) for w in _works(system, options, value, way)]
        num_streams = value if options.over is Over.sessions else 1
        blocks.append((value, await run_block(system, works, num_streams)))


def _works(system: System, options: GrowthOptions, value: int, way: Variant) -> list[Work]:
    from outrider_bench.measuring.load import Work

    num = value if options.over is Over.sessions else options.prompts
    room = system.info.target.max_context_len - options.max_tokens
    if options.over is Over.context:
        if value > room:
            raise ConfigError(
                f"--points: {value} exceeds the model's context minus --max-tokens: at most {room}"
            )
        prompts = [system.prompts.random_ids(i, value) for i in range(num)]
    else:
        prompts = [system.prompts.ids(i) for i in range(num)]
    if options.over is Over.gamma:
        way = replace(way, gamma=value)
    return [Work(way, i, prompts[i], options.max_tokens, seed=i) for i in range(num)]


def _summarised(blocks: list[tuple[int, Block]]) -> list[Point]:
    from outrider_bench.measuring.summary import Rounds

    groups: dict[tuple[str, int], list[Block]] = {}
    for value, block in sorted(blocks, key=lambda one: one[0]):
        groups.setdefault((block.variant, value), []).append(block)
    points = []
    for (variant, value), group in groups.items():
        samples = [sample for block in group for sample in block.samples]
        if all(block.num_streams == 1 for block in group):
            rates = [sample.tokens_per_s for sample in samples]  # excludes the prompt
        else:
            rates = [block.tokens_per_s for block in group]
        summed = Rounds.of(samples)
        assert summed is not None, "the orchestrator reports statistics of every output"
        first_s = statistics.median(sample.first_s for sample in samples)
        median = statistics.median(rates)
        points.append(Point(variant, value, median, min(rates), max(rates), first_s, summed))
    return points


def _panels(over: Over, points: list[Point]) -> list[Panel]:
    from outrider_bench.measuring.plots import Line, Panel

    rates, steps = [], []
    for name in dict.fromkeys(point.variant for point in points):
        own = [point for point in points if point.variant == name]
        xs = [point.value for point in own]
        ranges = [(point.least, point.most) for point in own]
        rates.append(Line(name, xs, [point.tokens_per_s for point in own], ranges))
        steps.append(Line(name, xs, [1e3 * point.rounds.target_step_s for point in own]))
    is_log = over is not Over.gamma
    return [
        Panel(_LABELS[over], "tokens/s", rates, is_log_x=is_log),
        Panel(_LABELS[over], "target pass, ms", steps, is_log_x=is_log),
    ]


def _table(over: Over, points: list[Point]) -> Table:
    from outrider_bench.measuring.show import number, table

    columns = ("variant", _LABELS[over], "tokens/s", "range", "TTFT ms", "α", "γ", "target ms")
    shown = table(f"growth with {_LABELS[over]}", columns)
    for point in points:
        rounds = point.rounds
        shown.add_row(
            point.variant, f"{point.value:,}", number(point.tokens_per_s, 1),
            f"{point.least:.1f} … {point.most:.1f}", number(1e3 * point.first_s, 0),
            number(rounds.alpha), number(rounds.mean_gamma, 1),
            number(1e3 * rounds.target_step_s, 2),
        )  # fmt: skip
    return shown
