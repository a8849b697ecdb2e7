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

from outrider.cli.bench.system import BenchOptions, System, measured_system
from outrider.cli.options import parse_list, takes
from outrider.errors import ConfigError
from outrider.simulation import Simulation

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.cli.bench.document import Document, Goal
    from outrider.cli.bench.load import Block, Work
    from outrider.cli.bench.summary import Rounds
    from outrider.cli.bench.workload import Variant
    from outrider.costs import CostReport

_NUM_WARM_UP_TOKENS = 48
# The simulation is worth its while if it is this near.
_MOST_OFF = 0.10


@dataclass(frozen=True)
class TwinOptions(BenchOptions):
    gamma: Annotated[int, typer.Option(min=1, help="Of the variants with a fixed γ.")] = 4
    streams: Annotated[str, typer.Option(help="At a time: 1,4.")] = "1,4"
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
    from outrider.cli.bench.document import Document
    from outrider.cli.bench.show import bench_console, finish
    from outrider.cli.running import run

    if options.is_simulated or options.simulate_draft:
        raise ConfigError("--simulate-target, --simulate-draft: this command finds them itself")
    options = options.quickened(streams="1")
    console, document = bench_console(), Document(options.name, options)
    rows = run(_measure(options, console, document))
    document.results += [asdict(row) for row in rows]
    document.goals += _goals(rows)
    document.write()
    finish(console, document, [_table(rows)])


def variants(gamma: int) -> list[Variant]:
    """In turn, ahead by one outcome, as served; and plain."""
    from outrider.cli.bench.workload import Variant, adaptive, plain

    return [
        plain(),
        Variant(f"in turn, γ {gamma}", gamma=gamma, lookahead=0),
        Variant(f"ahead, γ {gamma}", gamma=gamma, lookahead=1, fan_out=1),
        adaptive(),
    ]


async def _measure(options: TwinOptions, console: Console, document: Document) -> list[Compared]:
    from outrider.cli.bench.load import in_turn
    from outrider.cli.bench.show import progress

    counts = parse_list(options.streams, "--streams", int)
    ways = variants(options.gamma)
    blocks: dict[tuple[str, int, bool], list[Block]] = {}
    async with measured_system(options, console) as real:
        real.require_draft()
        document.about(real)
        first = await _block(real, ways[1], 1, options, 0)  # what the simulation is told
        target, draft = await _simulations(real, first)
        told = replace(
            options,
            target=None, draft=None, inflate=None,
            simulate_target=str(target), simulate_draft=str(draft),
        )  # fmt: skip
        document.results.append({"simulate_target": str(target), "simulate_draft": str(draft)})
        num_steps = 2 * options.repetitions * len(counts) * len(ways)
        logs = options.out / "logs" / "twin"
        async with measured_system(told, console, lambda _: real.layout, log_dir=logs) as twin:
            with progress(console, num_steps) as step:
                for repetition, num in in_turn(counts, options.repetitions):
                    for way in ways:
                        for system in (real, twin):
                            step(f"{num} × {way.name}")
                            block = await _block(system, way, num, options, repetition)
                            key = (way.name, num, system is real)
                            blocks.setdefault(key, []).append(block)
                            document.samples.append({"is_real": key[2]} | block.to_dict())
    return [_compared(way.name, num, blocks) for num in counts for way in ways]


async def _block(
    system: System, way: Variant, num_streams: int, options: TwinOptions, repetition: int
) -> Block:
    """Every prompt once for each stream, after a warm-up."""
    from outrider.cli.bench.load import Work, run_block

    def works(num: int, max_tokens: int) -> list[Work]:
        prompts = range(num)
        ids = [system.prompts.ids(prompt) for prompt in prompts]
        return [Work(way, p, ids[p], max_tokens, repetition, seed=p) for p in prompts]

    await run_block(system, works(num_streams, _NUM_WARM_UP_TOKENS), num_streams)
    num = max(options.prompts, num_streams)
    return await run_block(system, works(num, options.max_tokens), num_streams)


async def _simulations(real: System, block: Block) -> tuple[Simulation, Simulation]:
    """What the tiers say of their passes, and the draft tokens that stood at each position."""
    from outrider.cli.bench.tiers import draft_info, target_info
    from outrider.wire import costs_from_proto

    addresses = real.stack.addresses
    target = costs_from_proto((await target_info(addresses["target"])).costs)
    draft = costs_from_proto((await draft_info(addresses["draft"])).costs)
    shared: dict[str, Any] = {
        "vocab_size": real.info.target.vocab_size,
        "context_len": real.info.target.max_context_len,
    }
    return (
        Simulation(step_ms=_steps(target), row_ms=_ms(target.row_s), **shared),
        Simulation(
            step_ms=_steps(draft), row_ms=_ms(draft.row_s), survival=survival(block), **shared
        ),
    )


def survival(block: Block) -> tuple[float, ...]:
    """Chance of each position's draft token, if those before it stood.

    Of rounds that all had the same γ, but for the last of an output. Raises ConfigError where no
    round had draft tokens.
    """
    stats = [sample.stats for sample in block.samples if sample.stats is not None]
    stood = [sum(s.num_drafts for s in stats)]
    if not stood[0]:
        raise ConfigError("--draft: it was never in time; there is nothing to tell a simulation")
    for position in range(max(1, *(len(s.num_accepted_tokens_per_pos) for s in stats))):
        per_pos = [s.num_accepted_tokens_per_pos for s in stats]
        stood.append(sum(own[position] for own in per_pos if position < len(own)))
    return tuple(round(after / before, 4) for before, after in pairwise(stood) if before)


def _steps(costs: CostReport) -> tuple[tuple[int, float], ...]:
    return tuple(
        (num, _ms(step_s)) for num, step_s in zip(costs.num_tokens, costs.step_s, strict=True)
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _compared(
    name: str, num_streams: int, blocks: dict[tuple[str, int, bool], list[Block]]
) -> Compared:
    from outrider.cli.bench.summary import Rounds

    def of(is_real: bool) -> tuple[float, Rounds]:
        own = blocks[name, num_streams, is_real]
        rounds = Rounds.of(sample for block in own for sample in block.samples)
        assert rounds is not None, "the orchestrator tells of every output"
        return statistics.median(block.tokens_per_s for block in own), rounds

    (rate, real), (simulated_rate, simulated) = of(True), of(False)
    off = simulated_rate / rate - 1
    return Compared(name, num_streams, rate, simulated_rate, off, real, simulated)


def _goals(rows: Sequence[Compared]) -> list[Goal]:
    from outrider.cli.bench.document import Goal

    return [
        Goal(f"{row.num_streams} × {row.variant}: off", _MOST_OFF, abs(row.off), is_most=True)
        for row in rows
    ]


def _table(rows: Sequence[Compared]) -> Table:
    from outrider.cli.bench.show import number, share, table

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
