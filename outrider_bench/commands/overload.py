"""`outrider bench overload`: five times as many callers as can be served, and who gets what.

Owns the system, the order of phases and what is asked of them; who is let in is the orchestrator's.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreUse
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.commands.crowd import Crowd
    from outrider_bench.loadtest.driver import Phase, Subject
    from outrider_bench.loadtest.plan import Workload
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import Step

# A pass of 16 rows with a few draft tokens each is no dearer than one of one row.
# Long enough that Python, which shares the cores with everything here, is little of it.
_TARGET = "step_ms=1:80.0/128:80.0/512:160.0"
_DRAFT = "step_ms=1:6.0/64:6.0/256:12.0,survival=0.8"
_WARM_UP_S = 3.0
# How long what ran is given to end when nobody asks any more.
_REST_S = 10.0


@dataclass(frozen=True)
class OverloadOptions(BenchOptions):
    simulate_target: Annotated[
        str | None, typer.Option(metavar="SPEC", help="As in `outrider up`; not with --target.")
    ] = _TARGET
    simulate_draft: Annotated[str | None, typer.Option(metavar="SPEC", help="Likewise.")] = _DRAFT
    cores: Annotated[CoreUse, typer.Option(help="Simulated passes need none.")] = CoreUse.shared
    generations: Annotated[int, typer.Option(min=1, help="Generations at a time.")] = 16
    waiting: Annotated[
        int | None,
        typer.Option(min=0, help="Requests that may wait. Default: a quarter of --generations."),
    ] = None
    factor: Annotated[float, typer.Option(min=1, help="Times the capacity that is offered.")] = 5.0
    burstiness: Annotated[
        float, typer.Option(help="Of the arrivals; 1: Poisson, less: in bursts.")
    ] = 1.0
    seconds: Annotated[float, typer.Option(min=1, help="Of each phase.")] = 20.0
    settle: Annotated[float, typer.Option(min=0, help="Left out at the begin of a phase.")] = 4.0
    output_len: Annotated[str, typer.Option(help="Tokens; as in `outrider bench serve`.")] = (
        "uniform:32:96"
    )
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all is measured.")] = 2
    name: Annotated[str, typer.Option(help="Of the files.")] = "overload"


@takes(OverloadOptions)
def overload(options: OverloadOptions) -> None:
    """Capacity in a closed loop, then five times that rate in an open one; of a system of its own.

    What the accepted and the refused lived through, and whether the system is as it was afterwards.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.crowd import goals, panels, table
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = _resolved(options)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    crowds = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(crowd) for crowd in crowds]
        document.judge(lambda: goals(crowds))
        document.write()
        draw(document.plot_path, f"{options.factor:g} × capacity offered", panels(crowds))
        finish(console, document, [table(crowds)])


def _resolved(options: OverloadOptions) -> OverloadOptions:
    from dataclasses import replace

    from outrider_bench.loadtest.lengths import Lengths

    options = options.with_quick_defaults(
        seconds=3.0, settle=1.0, generations=4, output_len="uniform:8:24"
    )
    if options.settle >= options.seconds:
        raise ConfigError("--settle: must be less than --seconds")
    Lengths.parse(options.output_len, "--output-len")
    if options.target is not None:
        simulated = (options.simulate_target, options.simulate_draft)
        if simulated != (_TARGET, _DRAFT):
            raise ConfigError("--simulate-target: not together with --target")
        options = replace(options, simulate_target=None, simulate_draft=None)
    if options.waiting is None:
        options = replace(options, waiting=options.generations // 4)
    return options


async def _measure(options: OverloadOptions, console: Console, document: Document) -> list[Crowd]:
    from outrider.client.channel import open_channel
    from outrider_bench.loadtest.driver import subject
    from outrider_bench.measuring.show import progress

    changes: dict[str, Any] = {
        "max_generations": options.generations,
        "max_waiting": options.waiting,
    }
    crowds: list[Crowd] = []
    async with measured_system(options, console, **changes) as system:
        document.about(system)
        dying = asyncio.create_task(system.stack.next_death())
        try:
            async with open_channel(system.stack.endpoint) as channel:
                whom = await subject(channel)
                num_steps = 2 + 2 * options.repetitions
                expected_s = _WARM_UP_S + (num_steps - 1) * options.seconds
                with progress(console, num_steps, document, crowds, expected_s=expected_s) as step:
                    await _phases(options, system, whom, document, step, crowds)
            if dying.done():
                crowds[-1].deaths.append(str(dying.result()[0]))
        finally:
            dying.cancel()
            await asyncio.gather(dying, return_exceptions=True)
    return crowds


async def _phases(
    options: OverloadOptions,
    system: System,
    whom: Subject,
    document: Document,
    step: Step,
    crowds: list[Crowd],
) -> None:
    """Capacity and overload in turn, and capacity once more: is the system as it was?

    Adds to `crowds`.
    """
    from outrider_bench.commands.crowd import Crowd

    step("warm-up")
    await at_capacity(options, whom, 0, _WARM_UP_S)
    for repetition in range(options.repetitions):
        step("capacity")
        phase = await at_capacity(options, whom, 1 + 2 * repetition, options.seconds)
        crowds.append(Crowd.of("capacity", phase.records, options.settle, options.seconds))
        _keep(document, crowds[-1].name, repetition, phase)
        # A machine that stalls may have served nobody in time: then as if it were one.
        rate = options.factor * max(crowds[-1].requests_per_s, 1 / options.seconds)
        step(f"{rate:.1f} requests/s offered")
        phase = await beyond_capacity(options, whom, 2 + 2 * repetition, rate)
        crowds.append(Crowd.of("overload", phase.records, options.settle, options.seconds, rate))
        _keep(document, crowds[-1].name, repetition, phase)
    step("capacity, afterwards")
    phase = await at_capacity(options, whom, 1 + 2 * options.repetitions, options.seconds)
    crowds.append(Crowd.of("afterwards", phase.records, options.settle, options.seconds))
    _keep(document, crowds[-1].name, options.repetitions, phase)
    crowds[-1].num_left_open = await _left_open(system)


def _workload(options: OverloadOptions) -> Workload:
    from outrider_bench.loadtest.lengths import Lengths
    from outrider_bench.loadtest.plan import Workload

    return Workload(
        input_len=Lengths.parse(str(options.prompt_len), "--prompt-len"),
        output_len=Lengths.parse(options.output_len, "--output-len"),
        num_turns=Lengths.parse("1", "turns"),
        seed=options.seed,
    )


def _phase(options: OverloadOptions, whom: Subject, number: int) -> Phase:
    from outrider_bench.loadtest.asking import Ask
    from outrider_bench.loadtest.driver import Phase

    return Phase(whom, Ask(), number=number, seed=options.seed, run=options.name)


async def at_capacity(
    options: OverloadOptions, whom: Subject, number: int, seconds: float
) -> Phase:
    """As many callers as generations: all places taken, nobody in the line."""
    from outrider_bench.loadtest.plan import endless

    visits = endless(_workload(options).visits(1024))
    phase = _phase(options, whom, number)
    await phase.closed_loop(visits, options.generations, until_s=seconds)
    return phase


async def beyond_capacity(
    options: OverloadOptions, whom: Subject, number: int, rate: float
) -> Phase:
    from outrider_bench.loadtest.plan import timed

    num = max(1, round(rate * options.seconds))
    visits = timed(
        _workload(options).visits(num), rate, options.burstiness, seed=options.seed + number
    )
    phase = _phase(options, whom, number)
    await phase.open_loop(visits)
    return phase


def _keep(document: Document, name: str, repetition: int, phase: Phase) -> None:
    from outrider_bench.loadtest.results import sample

    document.samples += [
        {"phase": name, "repetition": repetition} | sample(record) for record in phase.records
    ]


async def _left_open(system: System) -> int | None:
    """Generations that are open at the target though nobody asks for any."""
    from outrider_bench.measuring.tiers import target_info

    num_open = 0
    for _ in range(int(_REST_S / 0.1)):
        num_open = (await target_info(system.stack.addresses["target"])).load.num_open_generations
        if not num_open:
            break
        await asyncio.sleep(0.1)
    return num_open
