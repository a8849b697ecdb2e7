"""`outrider bench twin`: compares a real system with its simulation.

Measures the costs of passes and the acceptance of a real pair, simulates a pair with the same costs
and acceptance, and compares rounds and tokens/s.
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
# Attempts to measure the acceptance of draft tokens.
_MAX_TRIES = 8
# Goal: largest relative error of the simulated tokens/s.
_MAX_OFF = 0.10


@dataclass(frozen=True)
class TwinOptions(BenchOptions):
    """Flags of `outrider bench twin`."""

    gamma: Annotated[int, typer.Option(min=1, help="γ of the variants with a fixed γ.")] = 4
    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams: 1,4.")] = "1,4"
    ranks: Annotated[
        str,
        typer.Option(help="On rejection: probabilities of the draft's second, third, … choice."),
    ] = "0.6/0.2/0.1"
    name: Annotated[str, typer.Option(help="Name of the files.")] = "twin"


@dataclass(frozen=True)
class Compared:
    """A table row. `off`: relative error of the simulated tokens/s."""

    variant: str
    num_streams: int
    tokens_per_s: float
    simulated_tokens_per_s: float
    off: float
    real: Rounds
    simulated: Rounds


@takes(TwinOptions)
def twin(options: TwinOptions) -> None:
    """Compare a model pair with a simulation of the same costs and acceptance."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    if options.is_simulated or options.simulate_draft:
        raise ConfigError(
            "--simulate-target, --simulate-draft: not allowed: this command measures real models"
        )
    options = options.with_quick_defaults(streams="1")
    console, document = bench_console(), Document(options.name, options)
    rows = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(row) for row in rows]
        document.add_goals(lambda: _goals(rows))
        document.write()
        finish(console, document, [_table(rows)])


def variants(gamma: int) -> list[Variant]:
    """Plain, sequential, drafting ahead one branch, and the server's default."""
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
        acceptance = await _acceptance(real, ways[1], options)
        num_steps = 2 * options.repetitions * len(counts) * len(ways)
        with progress(console, num_steps, document, rows) as step:
            for num in counts:
                for way in ways:
                    await _block(
                        real, way, num, options, 0
                    )  # measures the costs of passes under this load
                    simulation_options = await _simulation_options(real, options, acceptance)
                    logs = options.out / "logs" / "twin"
                    async with measured_system(
                        simulation_options, console, lambda _: real.layout, log_dir=logs
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
    """Runs the real system and its simulation alternately."""
    from outrider_bench.measuring.summary import Rounds

    blocks: tuple[list[Block], list[Block]] = ([], [])
    for repetition in range(options.repetitions):
        for system, own in zip(systems, blocks, strict=True):
            step(f"{num_streams} × {way.name}")
            own.append(await _block(system, way, num_streams, options, repetition))
            document.samples.append({"is_real": system is systems[0]} | own[-1].to_dict())
    rate, simulated_rate = (statistics.median(b.tokens_per_s for b in own) for own in blocks)
    real, simulated = (Rounds.of(s for b in own for s in b.samples) for own in blocks)
    assert real is not None, "the orchestrator reports statistics of every output"
    assert simulated is not None, "the simulated one too"
    off = simulated_rate / rate - 1
    return Compared(way.name, num_streams, rate, simulated_rate, off, real, simulated)


async def _block(
    system: System, way: Variant, num_streams: int, options: TwinOptions, repetition: int
) -> Block:
    """Runs every prompt, at least one per stream, after a warm-up."""
    from outrider_bench.measuring.load import Work, run_block

    def works(num: int, max_tokens: int) -> list[Work]:
        prompts = range(num)
        ids = [system.prompts.ids(prompt) for prompt in prompts]
        return [Work(way, p, ids[p], max_tokens, repetition, seed=p) for p in prompts]

    await run_block(system, works(num_streams, _NUM_WARM_UP_TOKENS), num_streams)
    num = max(options.prompts, num_streams)
    return await run_block(system, works(num, options.max_tokens), num_streams)


async def _acceptance(real: System, way: Variant, options: TwinOptions) -> tuple[float, ...]:
    """Acceptance by position. Retries if the draft was late in all rounds (busy machine)."""
    blocks = [await _block(real, way, 1, options, 0)]
    while not _has_drafts(blocks[-1]) and len(blocks) < _MAX_TRIES:
        blocks.append(await _block(real, way, 1, options, 0))
    return survival(blocks[-1])


def _has_drafts(block: Block) -> bool:
    return any(s.stats is not None and s.stats.num_draft_tokens for s in block.samples)


async def _simulation_options(
    real: System, options: TwinOptions, acceptance: tuple[float, ...]
) -> TwinOptions:
    """Options that simulate the pass costs which the tiers report now."""
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
        step_ms=_steps(draft), row_ms=_ms(draft.row_s), survival=acceptance, ranks=ranks, **shared
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
    """Acceptance probability of the draft token at each position, if all before it were accepted.

    Raises ConfigError if no round had draft tokens.
    """
    from outrider_bench.measuring.summary import survival_by_position

    reached = [1.0, *survival_by_position(block.samples)]
    if len(reached) == 1:
        raise ConfigError("--draft: no draft token was in time; the acceptance is unknown")
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
        Goal(
            f"{row.num_streams} × {row.variant}: relative error",
            _MAX_OFF,
            abs(row.off),
            is_most=True,
        )
        for row in rows
    ]


def _table(rows: Sequence[Compared]) -> Table:
    from outrider_bench.measuring.show import number, share, table

    columns = (
        "variant",
        "streams",
        "tokens/s",
        "simulated",
        "error",
        "α",
        "tokens/round",
        "hits",
        "γ",
    )
    shown = table("system and simulation (real · simulated)", columns)
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
