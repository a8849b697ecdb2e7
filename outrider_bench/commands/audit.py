"""`outrider bench audit`: how fast the audit finds a planted bias, and what it costs.

The bias: acceptance probabilities are divided by 0.99. The cost: tokens/s of concurrent streams
with a share of the generations audited, relative to none. Each share has a system of its own; all
run at the same time, and only one is under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_list, takes
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client.info import Audit
    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.workload import Variant

# The goal of the cost is at this share.
_GOAL_SHARE = 0.01
# Tokens of concurrent streams between two looks at the alarms.
_TOKENS_PER_LOOK = 2_000
# A re-run of an output takes less.
_IDLE_S = 3.0


@dataclass(frozen=True)
class AuditOptions(BenchOptions):
    """Flags of `outrider bench audit`."""

    bias: Annotated[float, typer.Option(help="Planted bias; 0: do not look for one.")] = 0.01
    runs: Annotated[int, typer.Option(min=1, help="Runs until an alarm, each of a new system.")] = 1
    gamma: Annotated[
        int, typer.Option(min=1, help="Draft tokens per round while looking for the bias.")
    ] = 4
    most_tokens: Annotated[int, typer.Option(help="Tokens after which a run is given up.")] = (
        200_000
    )
    shares: Annotated[str, typer.Option(help="Audited shares to compare with none: 0.01,1.")] = (
        "0.01,0.1"
    )
    streams: Annotated[int, typer.Option(min=1, help="Concurrent streams.")] = 16
    outputs: Annotated[int, typer.Option(min=1, help="Outputs of a measured block.")] = 128
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 1.0
    name: Annotated[str, typer.Option(help="Name of the files.")] = "audit"


@dataclass(frozen=True)
class Found:
    """A run until an alarm. `test` None: none came. `expected_trials`: as the audit states."""

    bias: float
    test: str | None
    num_tokens: int
    num_trials: int
    expected_trials: float
    observed: float
    expected: float


@dataclass(frozen=True)
class Cost:
    """Tokens/s with a share audited. `ratio`: median over repetitions of the ratio to none."""

    share: float
    tokens_per_s: float
    ratio: float
    num_reruns: int
    num_dropped: int


@takes(AuditOptions)
def audit(options: AuditOptions) -> None:
    """Measure how fast the audit finds a planted bias, and what it costs."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(most_tokens=2_000, shares="1", outputs=4, streams=2)
    console, document = bench_console(), Document(options.name, options)
    found: list[Found] = []
    blocks: list[tuple[float, Block, Audit]] = []
    run(_measure(options, console, document, found, blocks))
    document.samples += [{"share": share} | block.to_dict() for share, block, _ in blocks]
    with reporting(console, document):
        costs = _costs(blocks)
        document.results += [asdict(each) for each in found]
        document.results += [asdict(each) for each in costs]
        document.add_goals(lambda: _goals(found, costs))
        document.write()
        finish(console, document, [_found_table(found), _cost_table(costs)])


async def _measure(
    options: AuditOptions,
    console: Console,
    document: Document,
    found: list[Found],
    blocks: list[tuple[float, Block, Audit]],
) -> None:
    from outrider_bench.measuring.cores import core_per_tier
    from outrider_bench.measuring.load import interleaved
    from outrider_bench.measuring.show import progress
    from outrider_bench.measuring.workload import Variant

    shares = [0.0, *parse_list(options.shares, "--shares", float)]
    num_runs = options.runs if options.bias else 0
    num_steps = num_runs + options.repetitions * len(shares)
    measured: list[object] = []
    with progress(console, num_steps, document, measured) as step:
        for _ in range(num_runs):
            step(f"bias {options.bias:g}")
            found.append(await _find(options, console, document))
            measured.append(found[-1])
        variant = Variant("full", temperature=options.temperature, is_seeded=False)
        cores = core_per_tier(options.cores)  # the same for all: a system pins this process
        async with contextlib.AsyncExitStack() as stack:
            systems = {
                share: await stack.enter_async_context(
                    measured_system(options, console, lambda _: cores, audit_share=share)
                )
                for share in shares
            }
            document.about(systems[0.0])
            for system in systems.values():
                await _block(options, system, variant, 0, options.streams)
            for repetition, share in interleaved(shares, options.repetitions):
                step(f"share {share:g}")
                block = await _block(options, systems[share], variant, repetition, options.outputs)
                blocks.append((share, block, await _idle_audit(systems[share])))
                measured.append(block)


async def _idle_audit(system: System) -> Audit:
    """The audit once its queue is empty, so that it does not slow down the next block."""
    found = await system.client.audit()
    while True:
        await asyncio.sleep(_IDLE_S)
        latest = await system.client.audit()
        if (latest.num_tokens, latest.num_dropped) == (found.num_tokens, found.num_dropped):
            return latest
        found = latest


async def _find(options: AuditOptions, console: Console, document: Document) -> Found:
    """Generates until an alarm. Raises ConfigError without a draft."""
    from outrider_bench.measuring.workload import Variant

    num_tokens = 0
    async with measured_system(
        options, console, audit_share=1.0, audit_planted_bias=options.bias
    ) as system:
        system.require_draft()
        document.about(system)
        num_outputs = max(1, min(_TOKENS_PER_LOOK, options.most_tokens) // options.max_tokens)
        variant = Variant(
            "γ", gamma=options.gamma, temperature=options.temperature, is_seeded=False
        )
        while True:
            block = await _block(options, system, variant, 0, num_outputs)
            num_tokens += sum(len(sample.token_ids) for sample in block.samples)
            audit = await system.client.audit()
            alarm = next((test for test in audit.tests if test.num_alarms), None)
            if alarm is not None or num_tokens >= options.most_tokens:
                break
    acceptance = audit.tests[0]
    return Found(
        options.bias,
        alarm.name if alarm is not None else None,
        num_tokens,
        acceptance.num_trials,
        acceptance.expected_trials,
        acceptance.observed,
        acceptance.expected,
    )


async def _block(
    options: AuditOptions, system: System, variant: Variant, repetition: int, num: int
) -> Block:
    from outrider_bench.measuring.load import Work, run_block

    works = [
        Work(variant, i, system.prompts.ids(i), options.max_tokens, repetition) for i in range(num)
    ]
    return await run_block(system, works, options.streams)


def _costs(blocks: list[tuple[float, Block, Audit]]) -> list[Cost]:
    rates: dict[float, dict[int, float]] = {}
    last: dict[float, Any] = {}
    for share, block, audit in blocks:
        rates.setdefault(share, {})[block.repetition] = block.tokens_per_s
        last[share] = audit
    base = rates.get(0.0, {})
    costs = []
    for share, by_repetition in rates.items():
        ratios = [rate / base[i] for i, rate in by_repetition.items() if i in base]
        if ratios:
            costs.append(
                Cost(
                    share,
                    statistics.median(by_repetition.values()),
                    statistics.median(ratios),
                    sum(last[share].num_generations.values()),
                    sum(last[share].num_dropped.values()),
                )
            )
    return costs


def _goals(found: list[Found], costs: list[Cost]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    goals = [
        Goal(
            "draft tokens until the alarm, relative to the stated number",
            2.0,
            each.num_trials / each.expected_trials if each.test and each.expected_trials else None,
            is_most=True,
        )
        for each in found
    ]
    goals += [
        Goal(f"tokens/s with {cost.share:.0%} audited, relative to none", 0.98, cost.ratio)
        for cost in costs
        if cost.share == _GOAL_SHARE
    ]
    return goals


def _found_table(found: list[Found]) -> Table:
    from outrider_bench.measuring.show import number, table

    columns = ("bias", "alarm", "tokens", "draft tokens", "stated", "accepted", "expected")
    shown = table("planted bias", columns)
    for each in found:
        shown.add_row(
            f"{each.bias:g}", each.test or "none", f"{each.num_tokens:,}", f"{each.num_trials:,}",
            f"{each.expected_trials:,.0f}", number(each.observed, 4), number(each.expected, 4),
        )  # fmt: skip
    return shown


def _cost_table(costs: list[Cost]) -> Table:
    from outrider_bench.measuring.show import number, table

    columns = ("audited", "tokens/s", "relative", "re-runs", "dropped")
    shown = table("cost of the audit", columns)
    for cost in costs:
        shown.add_row(
            f"{cost.share:g}", number(cost.tokens_per_s, 1), number(cost.ratio, 3),
            f"{cost.num_reruns:,}", f"{cost.num_dropped:,}",
        )  # fmt: skip
    return shown
