"""`outrider bench concurrency`: total tokens/s of many streams, with drafts and without."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import parse_list, takes
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.plots import Panel
    from outrider_bench.measuring.summary import Rounds
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class ConcurrencyOptions(BenchOptions):
    """Flags of `outrider bench concurrency`."""

    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams: 1,2,4.")] = (
        "1,2,4,8,16,32"
    )
    requests: Annotated[int, typer.Option(min=1, help="Outputs per stream.")] = 2
    gammas: Annotated[str, typer.Option(help="Fixed γ to compare with: 2,5.")] = ""
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Also measure durability `fast`: tokens are sent before they are recorded.",
        ),
    ] = False
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0
    name: Annotated[str, typer.Option(help="Name of the files.")] = "concurrency"


@dataclass(frozen=True)
class Total:
    """A table row: a variant with a number of streams. Ratios are of medians; None: no baseline."""

    variant: str
    num_streams: int
    tokens_per_s: float
    least: float
    most: float
    over_plain: float | None
    over_one_stream: float | None
    rounds: Rounds | None


@takes(ConcurrencyOptions)
def concurrency(options: ConcurrencyOptions) -> None:
    """Measure total tokens/s of 1 to 32 streams in a closed loop, with and without drafts."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(streams="1,2", requests=1)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    blocks = run(_measure(options, console, document))
    document.samples += [block.to_dict() for block in blocks]
    with reporting(console, document):
        totals = summarised(blocks)
        document.results += [asdict(total) for total in totals]
        document.add_goals(lambda: _goals(totals))
        document.write()
        draw(document.plot_path, "Many streams", _panels(totals))
        finish(console, document, [_table(totals)])


def variants(options: ConcurrencyOptions) -> list[Variant]:
    """Variants to compare; plain decoding first."""
    from outrider_bench.measuring.workload import adaptive, fixed, plain

    temperature = options.temperature
    gammas = parse_list(options.gammas, "--gammas", int) if options.gammas else []
    ways = [plain(temperature), adaptive(temperature)]
    ways += [fixed(gamma, temperature) for gamma in gammas]
    if options.fast:
        ways.append(replace(adaptive(temperature), name="fast", is_fast=True))
    return ways


async def _measure(
    options: ConcurrencyOptions, console: Console, document: Document
) -> list[Block]:
    streams = parse_list(options.streams, "--streams", int)
    async with measured_system(options, console, max_generations=max(256, *streams)) as system:
        system.require_draft()
        document.about(system)
        return await measure_blocks(system, options, variants(options), streams, console, document)


async def measure_blocks(
    system: System,
    options: ConcurrencyOptions,
    ways: list[Variant],
    streams: list[int],
    console: Console,
    document: Document,
) -> list[Block]:
    """Runs every variant with every number of streams; repetitions alternate the order."""
    from outrider_bench.measuring.load import Work, interleaved, run_block
    from outrider_bench.measuring.show import progress

    def works(variant: Variant, num_streams: int, num: int, max_tokens: int) -> list[Work]:
        ids = [system.prompts.ids(i % options.prompts) for i in range(num)]
        return [Work(variant, i % options.prompts, ids[i], max_tokens, 0, i) for i in range(num)]

    work = [(num_streams, variant) for num_streams in streams for variant in ways]
    blocks: list[Block] = []
    num_steps = len(ways) + options.repetitions * len(work)
    warm_up = (len(ways), options.requests * options.max_tokens / _NUM_WARM_UP_TOKENS / 2)
    with progress(console, num_steps, document, blocks, warm_up=warm_up) as step:
        for variant in ways:
            step(f"warm-up: {variant.name}")
            num = max(streams)
            await run_block(system, works(variant, num, num, _NUM_WARM_UP_TOKENS), num)
        for repetition, (num_streams, variant) in interleaved(work, options.repetitions):
            step(f"{variant.name}, {num_streams} streams")
            num = num_streams * options.requests
            own = works(variant, num_streams, num, options.max_tokens)
            own = [replace(one, repetition=repetition) for one in own]
            blocks.append(await run_block(system, own, num_streams))
    return blocks


def summarised(blocks: list[Block]) -> list[Total]:
    """Medians over the repetitions, ordered by number of streams and variant."""
    from outrider_bench.measuring.summary import Rounds

    groups: dict[tuple[int, str], list[Block]] = {}
    for block in sorted(blocks, key=lambda b: b.num_streams):
        groups.setdefault((block.num_streams, block.variant), []).append(block)
    rates = {key: statistics.median(b.tokens_per_s for b in group) for key, group in groups.items()}
    totals = []
    for (num_streams, variant), group in groups.items():
        rate = rates[num_streams, variant]
        base, alone = rates.get((num_streams, "plain")), rates.get((1, variant))
        totals.append(
            Total(
                variant=variant,
                num_streams=num_streams,
                tokens_per_s=rate,
                least=min(b.tokens_per_s for b in group),
                most=max(b.tokens_per_s for b in group),
                over_plain=rate / base if base else None,
                over_one_stream=rate / alone if alone else None,
                rounds=Rounds.of(sample for block in group for sample in block.samples),
            )
        )
    return totals


def _goals(totals: list[Total]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    full = [total for total in totals if total.variant == "full"]
    least = min((t.over_plain for t in full if t.over_plain is not None), default=None)
    goals = [Goal("adaptive γ over plain, at the worst number of streams", 0.98, least)]
    fast = {total.num_streams: total for total in totals if total.variant == "fast"}
    for total in full:
        if total.num_streams in fast:
            ratio = total.tokens_per_s / fast[total.num_streams].tokens_per_s
            text = f"durable over fast, {total.num_streams} streams"
            goals.append(Goal(text, 0.98, ratio))
    for total in full:
        if total.num_streams == 8:
            goals.append(
                Goal("adaptive γ over plain at 8 streams", 1.25, total.over_plain, pair="p1")
            )
        if total.num_streams == 16:
            text = "16 streams over one, adaptive γ (P1)"
            goals.append(Goal(text, 4.0, total.over_one_stream, pair="p1"))
    return goals


def _panels(totals: list[Total]) -> list[Panel]:
    from outrider_bench.measuring.plots import Line, Panel

    rates, gains = [], []
    for name in dict.fromkeys(total.variant for total in totals):
        own = [total for total in totals if total.variant == name]
        xs = [total.num_streams for total in own]
        ranges = [(total.least, total.most) for total in own]
        rates.append(Line(name, xs, [total.tokens_per_s for total in own], ranges))
        if name != "plain":
            gains.append(Line(name, xs, [total.over_plain or 0.0 for total in own]))
    return [
        Panel("streams", "total tokens/s", rates, is_log_x=True),
        Panel("streams", "over plain", gains, is_log_x=True, level=1.0),
    ]


def _table(totals: list[Total]) -> Table:
    from outrider_bench.measuring.show import number, share, table, times

    columns = ("streams", "variant", "tokens/s", "range", "over plain", "over 1 stream", "α", "γ")
    shown = table("total tokens/s of concurrent streams", (*columns, "waiting", "target ms"))
    previous = None
    for total in totals:
        if previous not in (None, total.num_streams):
            shown.add_section()
        is_same, previous = previous == total.num_streams, total.num_streams
        rounds = total.rounds
        cells = [""] * 4
        if rounds is not None:
            cells = [
                number(rounds.alpha), number(rounds.mean_gamma, 1),
                share(rounds.draft_wait_share), number(1e3 * rounds.target_step_s, 1),
            ]  # fmt: skip
        shown.add_row(
            "" if is_same else str(total.num_streams), total.variant,
            number(total.tokens_per_s, 1), f"{total.least:.1f} … {total.most:.1f}",
            times(total.over_plain, is_goal=total.variant != "plain"),
            times(total.over_one_stream), *cells,
        )  # fmt: skip
    return shown
