"""`outrider bench twin`: a real system and its simulation, side by side.

Measures a pair, tells a simulation what its passes cost and how often its draft tokens stood, and
compares rounds and tokens/s. Owns that translation and the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_list, takes
from outrider.errors import ConfigError
from outrider.settings.simulation import Simulation
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.replica import CostReport
    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.show import Step
    from outrider_bench.measuring.summary import Rounds
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 48
# Of the outputs that tell how often draft tokens stand.
_MOST_TRIES = 8
# The simulation is worth its while if it is this near.
_MOST_OFF = 0.10


@dataclass(frozen=True)
class TwinOptions(BenchOptions):
    gamma: Annotated[int, typer.Option(min=1, help="Of the variants with a fixed γ.")] = 4
    streams: Annotated[str, typer.Option(help="At a time: 1,4.")] = "1,4"
    ranks: Annotated[
        str, typer.Option(help="Where a draft token falls: chances of its other choices.")
    ] = "0.6/0.2/0.1"
    name: Annotated[str, typer.Option(help="Of the files.")] = "twin"


@dataclass(frozen=True)
class Compared:
    """A row. `off`: of the simulation's tokens/s, from the real ones."""

    variant: str
    num_streams: int
    tokens_per_s: float
    simulated_tokens_per_s: float
    off: float
    real: Rounds
    simulated: Rounds


@takes(TwinOptions)
def twin(options: TwinOptions) -> None:
    """A pair of models beside a simulation that is told their costs and acceptance."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    if options.is_simulated or options.simulate_draft:
        raise ConfigError("--simulate-target, --simulate-draft: this command finds them itself")
    options = options.with_quick_defaults(streams="1")
    console, document = bench_console(), Document(options.name, options)
    rows = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(row) for row in rows]
        document.judge(lambda: _goals(rows))
        document.write()
        finish(console, document, [_table(rows)])


def variants(gamma: int) -> list[Variant]:
    """In turn, ahead by one outcome, as served; and plain."""
    from outrider_bench.measuring.workload import Variant, adaptive, plain

    return [
        plain(),
        Variant(f"in turn, γ {gamma}", gamma=gamma, lookahead=0),
        Variant(f"ahead, γ {gamma}", gamma=gamma, lookahead=1, fan_out=1),
        adaptive(),
    ]


async def _measure(options: TwinOptions, console: Console, document: Document) -> list[Compared]:
    from outrider_bench.measuring.show import progress

    counts = parse_list(options.streams, "--streams", int)
    ways = variants(options.gamma)
    rows: list[Compared] = []
    async with measured_system(options, console) as real:
        real.require_draft()
        document.about(real)
        stood = await _stood(real, ways[1], options)
        num_steps = 2 * options.repetitions * len(counts) * len(ways)
        with progress(console, num_steps, document, rows) as step:
            for num in counts:
                for way in ways:
                    await _block(real, way, num, options, 0)  # what passes cost when it is so
                    told = await _told(real, options, stood)
                    logs = options.out / "logs" / "twin"
                    async with measured_system(
                        told, console, lambda _: real.layout, log_dir=logs
                    ) as simulated:
                        rows.append(
                            await _compared((real, simulated), way, num, options, document, step)
                        )
    return rows


async def _compared(
    systems: tuple[System, System],
    way: Variant,
    num_streams: int,
    options: TwinOptions,
    document: Document,
    step: Step,
) -> Compared:
    """The real system and its simulation, in turn."""
    from outrider_bench.measuring.summary import Rounds

    blocks: tuple[list[Block], list[Block]] = ([], [])
    for repetition in range(options.repetitions):
        for system, own in zip(systems, blocks, strict=True):
            step(f"{num_streams} × {way.name}")
            own.append(await _block(system, way, num_streams, options, repetition))
            document.samples.append({"is_real": system is systems[0]} | own[-1].to_dict())
    rate, simulated_rate = (statistics.median(b.tokens_per_s for b in own) for own in blocks)
    real, simulated = (Rounds.of(s for b in own for s in b.samples) for own in blocks)
    assert real is not None, "the orchestrator tells of every output"
    assert simulated is not None, "and the other one too"
    off = simulated_rate / rate - 1
    return Compared(way.name, num_streams, rate, simulated_rate, off, real, simulated)


async def _block(
    system: System, way: Variant, num_streams: int, options: TwinOptions, repetition: int
) -> Block:
    """Every prompt once for each stream, after a warm-up."""
    from outrider_bench.measuring.load import Work, run_block

    def works(num: int, max_tokens: int) -> list[Work]:
        prompts = range(num)
        ids = [system.prompts.ids(prompt) for prompt in prompts]
        return [Work(way, p, ids[p], max_tokens, repetition, seed=p) for p in prompts]

    await run_block(system, works(num_streams, _NUM_WARM_UP_TOKENS), num_streams)
    num = max(options.prompts, num_streams)
    return await run_block(system, works(num, options.max_tokens), num_streams)


async def _stood(real: System, way: Variant, options: TwinOptions) -> tuple[float, ...]:
    """Its survival; on a busy machine a draft may be late in all rounds of an output, or of two."""
    blocks = [await _block(real, way, 1, options, 0)]
    while not _has_drafts(blocks[-1]) and len(blocks) < _MOST_TRIES:
        blocks.append(await _block(real, way, 1, options, 0))
    return survival(blocks[-1])


def _has_drafts(block: Block) -> bool:
    return any(s.stats is not None and s.stats.num_draft_tokens for s in block.samples)


async def _told(real: System, options: TwinOptions, stood: tuple[float, ...]) -> TwinOptions:
    """The simulation of what the tiers say of their passes now."""
    from outrider.runtime.protobuf import costs_from_proto
    from outrider_bench.measuring.tiers import draft_info, target_info

    addresses = real.stack.addresses
    target = costs_from_proto((await target_info(addresses["target"])).costs)
    draft = costs_from_proto((await draft_info(addresses["draft"])).costs)
    shared: dict[str, Any] = {
        "vocab_size": real.info.target.vocab_size,
        "context_len": real.info.target.max_context_len,
    }
    ranks = tuple(parse_list(options.ranks.replace("/", ","), "--ranks", float))
    guess = Simulation(
        step_ms=_steps(draft), row_ms=_ms(draft.row_s), survival=stood, ranks=ranks, **shared
    )
    truth = Simulation(step_ms=_steps(target), row_ms=_ms(target.row_s), **shared)
    return replace(
        options,
        target=None,
        draft=None,
        inflate=None,
        simulate_target=str(truth),
        simulate_draft=str(guess),
    )


def survival(block: Block) -> tuple[float, ...]:
    """Chance of each position's draft token, if those before it stood.

    Of the rounds that had one there: the last ones of an output have fewer. Raises ConfigError
    where no round had draft tokens.
    """
    stats = [sample.stats for sample in block.samples if sample.stats is not None]
    reached = [1.0]
    for position in range(max(len(s.num_accepted_tokens_per_pos) for s in stats) if stats else 0):
        num_had = sum(sum(s.num_rounds_per_gamma[position + 1 :]) for s in stats)
        num_stood = sum(sum(s.num_accepted_tokens_per_pos[position : position + 1]) for s in stats)
        reached.append(num_stood / num_had)
    if len(reached) == 1:
        raise ConfigError("--draft: it was never in time; there is nothing to tell a simulation")
    return tuple(round(min(1.0, b / a), 4) for a, b in pairwise(reached) if a)


def _steps(costs: CostReport) -> tuple[tuple[int, float], ...]:
    return tuple(
        (num, _ms(step_s)) for num, step_s in zip(costs.num_tokens, costs.step_s, strict=True)
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _goals(rows: Sequence[Compared]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    return [
        Goal(f"{row.num_streams} × {row.variant}: off", _MOST_OFF, abs(row.off), is_most=True)
        for row in rows
    ]


def _table(rows: Sequence[Compared]) -> Table:
    from outrider_bench.measuring.show import number, share, table

    columns = ("", "streams", "tokens/s", "simulated", "off", "α", "tokens a round", "hits", "γ")
    shown = table("a system and its simulation (real · simulated)", columns)
    for row in rows:
        a, b = row.real, row.simulated
        shown.add_row(
            row.variant, str(row.num_streams),
            number(row.tokens_per_s, 1), number(row.simulated_tokens_per_s, 1),
            f"{100 * row.off:+.1f} %",
            f"{number(a.alpha)} · {number(b.alpha)}",
            f"{number(a.tokens_per_round)} · {number(b.tokens_per_round)}",
            f"{share(a.hit_rate)} · {share(b.hit_rate)}",
            f"{number(a.mean_gamma, 1)} · {number(b.mean_gamma, 1)}",
        )  # fmt: skip
    return shown
