"""`outrider bench delay`: tokens/s with a network delay between orchestrator and draft.

The relay of `outrider up` adds the delay.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import parse_list, takes
from outrider_bench.measuring.system import BenchOptions, System, measured_system, wait_for_draft

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Sample
    from outrider_bench.measuring.plots import Panel
    from outrider_bench.measuring.summary import Rounds
    from outrider_bench.measuring.workload import Variant

# After each change, adaptive γ measures the new costs during the warm-up.
_NUM_WARM_UP_TOKENS = 48
_CONNECTED_S = 60.0


@dataclass(frozen=True)
class DelayOptions(BenchOptions):
    """Flags of `outrider bench delay`."""

    delays: Annotated[str, typer.Option(help="One-way delays in milliseconds: 0,1,5,20.")] = (
        "0,1,5,20"
    )
    ahead: Annotated[
        str,
        typer.Option(
            help="Look-ahead x fan-out to compare with the server's default: 0x1,1x1,2x4."
        ),
    ] = "0x1,1x1,1x4,2x4"
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0
    name: Annotated[str, typer.Option(help="Name of the files.")] = "delay"


@dataclass(frozen=True)
class Delayed:
    """A table row. `lost`: loss relative to the same variant without delay; None: not measured."""

    variant: str
    delay_ms: float
    tokens_per_s: float
    lost: float | None
    rounds: Rounds | None


@takes(DelayOptions)
def delay(options: DelayOptions) -> None:
    """Measure tokens/s of one stream with a network delay to the draft."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(delays="0,5", ahead="1x1")
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    measured = run(_measure(options, console, document))
    document.samples += [{"delay_ms": ms} | sample.to_dict() for ms, sample in measured]
    with reporting(console, document):
        rows = _summarised(measured)
        document.results += [asdict(row) for row in rows]
        document.add_goals(lambda: _goals(rows))
        document.write()
        draw(document.plot_path, "Network delay to the draft", _panels(rows))
        finish(console, document, [_table(rows)])


def variants(options: DelayOptions) -> list[Variant]:
    """The server's default, the settings of `--ahead`, and plain decoding."""
    from outrider_bench.measuring.workload import Variant, adaptive, plain

    temperature = options.temperature
    ways = [adaptive(temperature)]
    for entry in filter(None, options.ahead.split(",")):
        setting = parse_list(entry.replace("x", ","), "--ahead", int)
        lookahead, fan_out = setting if len(setting) == 2 else (setting[0], 1)
        name = f"ahead {lookahead}, fan {fan_out}"
        ways.append(Variant(name, lookahead=lookahead, fan_out=fan_out, temperature=temperature))
    return [*ways, plain(temperature)]


async def _measure(
    options: DelayOptions, console: Console, document: Document
) -> list[tuple[float, Sample]]:
    from outrider_bench.measuring.load import interleaved, one_output, run
    from outrider_bench.measuring.show import progress

    delays = parse_list(options.delays, "--delays", float)
    ways = variants(options)
    measured: list[tuple[float, Sample]] = []
    async with measured_system(options, console, draft_delay_ms=0.0) as system:
        system.require_draft()
        document.about(system)
        num_steps = options.repetitions * len(delays) * len(ways)
        with progress(console, num_steps, document, measured) as step:
            for repetition, delay_ms in interleaved(delays, options.repetitions):
                await _set_delay(system, delay_ms)
                for variant in ways if repetition % 2 == 0 else reversed(ways):
                    step(f"{delay_ms:g} ms: {variant.name}")
                    await run(system, one_output(system, variant, 0, _NUM_WARM_UP_TOKENS))
                    for prompt in range(options.prompts):
                        work = one_output(system, variant, prompt, options.max_tokens, repetition)
                        measured.append((delay_ms, await run(system, work)))
    return measured


async def _set_delay(system: System, delay_ms: float) -> None:
    """Sets the delay and reconnects the draft.

    An orchestrator measures the delay of a link when it connects.
    """
    relay = system.stack.relay
    assert relay is not None, "the system was started with a delay"
    relay.delay_s = delay_ms / 1000
    relay.reset()
    async with asyncio.timeout(_CONNECTED_S):
        for has_draft in (False, True):
            await wait_for_draft(system.client, has_draft)


def _summarised(measured: list[tuple[float, Sample]]) -> list[Delayed]:
    from outrider_bench.measuring.summary import Rounds

    groups: dict[tuple[str, float], list[Sample]] = {}
    for delay_ms, sample in sorted(measured, key=lambda one: one[0]):
        groups.setdefault((sample.variant, delay_ms), []).append(sample)
    rates = {key: statistics.median(s.tokens_per_s for s in group) for key, group in groups.items()}
    rows = []
    for (variant, delay_ms), group in groups.items():
        rate, base = rates[variant, delay_ms], rates.get((variant, 0.0))
        lost = 1 - rate / base if base else None
        rows.append(Delayed(variant, delay_ms, rate, lost, Rounds.of(group)))
    return rows


def _goals(rows: list[Delayed]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    limits = {5.0: 0.05, 20.0: 0.15}
    return [
        Goal(
            f"server default: share of tokens/s lost at {row.delay_ms:g} ms",
            limits[row.delay_ms],
            row.lost,
            is_most=True,
        )
        for row in rows
        if row.variant == "full" and row.delay_ms in limits
    ]


def _panels(rows: list[Delayed]) -> list[Panel]:
    from outrider_bench.measuring.plots import Line, Panel

    lines = []
    for name in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == name]
        xs = [row.delay_ms for row in own]
        lines.append(Line(name, xs, [row.tokens_per_s for row in own]))
    return [Panel("one-way delay, ms", "tokens/s", lines)]


def _table(rows: list[Delayed]) -> Table:
    from outrider_bench.measuring.show import number, share, table

    columns = ("variant", "delay ms", "tokens/s", "lost", "α", "γ", "hits", "waiting", "target ms")
    shown = table("one-way network delay to the draft", columns)
    previous = None
    names = list(dict.fromkeys(row.variant for row in rows))
    for row in sorted(rows, key=lambda row: names.index(row.variant)):
        if previous not in (None, row.variant):
            shown.add_section()
        is_same, previous = previous == row.variant, row.variant
        rounds = row.rounds
        cells = [""] * 5
        if rounds is not None:
            cells = [
                number(rounds.alpha), number(rounds.mean_gamma, 1), share(rounds.hit_rate),
                share(rounds.draft_wait_share), number(1e3 * rounds.target_step_s, 1),
            ]  # fmt: skip
        shown.add_row(
            "" if is_same else row.variant, f"{row.delay_ms:g}",
            number(row.tokens_per_s, 1), share(row.lost), *cells,
        )  # fmt: skip
    return shown
