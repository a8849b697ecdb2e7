"""`outrider bench overload`: latency, throughput and rejections at five times the capacity.

Owns the system, the order of phases and their load. `overload_phases` evaluates the results.
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

    from outrider_bench.commands.overload_phases import PhaseResult
    from outrider_bench.loadtest.driver import LoadedOrchestrators, Phase
    from outrider_bench.loadtest.plan import Workload
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import Step

# A pass of 16 verify requests with a few draft tokens each costs the same as a pass of one.
# Passes are long compared with the time that Python needs on the shared cores.
_TARGET = "step_ms=1:80.0/128:80.0/512:160.0"
_DRAFT = "step_ms=1:6.0/64:6.0/256:12.0,survival=0.8"
_WARM_UP_S = 3.0
# Longest wait for the last generations to end.
_DRAIN_S = 10.0


@dataclass(frozen=True)
class OverloadOptions(BenchOptions):
    """Flags of `outrider bench overload`."""

    simulate_target: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="As in `outrider up`; cannot be combined with --target."),
    ] = _TARGET
    simulate_draft: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="As in `outrider up`; cannot be combined with --target."),
    ] = _DRAFT
    cores: Annotated[
        CoreUse, typer.Option(help="shared: no pinning; simulated passes need no core.")
    ] = CoreUse.shared
    generations: Annotated[
        int, typer.Option(min=1, help="Maximum number of running generations.")
    ] = 16
    waiting: Annotated[
        int | None,
        typer.Option(
            min=0, help="Length of the admission queue. Default: a quarter of --generations."
        ),
    ] = None
    factor: Annotated[
        float, typer.Option(min=1, help="Offered load as a multiple of the capacity.")
    ] = 5.0
    burstiness: Annotated[
        float, typer.Option(help="Of arrivals: 1 is a Poisson process, less is more bursty.")
    ] = 1.0
    seconds: Annotated[float, typer.Option(min=1, help="Duration of each phase.")] = 20.0
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds not counted at the begin of a phase.")
    ] = 4.0
    output_len: Annotated[
        str, typer.Option(help="Tokens per output; format as in `outrider bench serve`.")
    ] = "uniform:32:96"
    repetitions: Annotated[int, typer.Option(min=1, help="Repetitions of every measurement.")] = 2
    name: Annotated[str, typer.Option(help="Name of the files.")] = "overload"


@takes(OverloadOptions)
def overload(options: OverloadOptions) -> None:
    """Measure a system at capacity (closed loop), then at five times that rate (open loop).

    Reports latencies of accepted and rejected requests, and whether the system recovers afterwards.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.overload_phases import goals, panels, table
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = _resolved(options)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    results = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(result) for result in results]
        document.add_goals(lambda: goals(results))
        document.write()
        draw(document.plot_path, f"load of {options.factor:g} × capacity", panels(results))
        finish(console, document, [table(results)])


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
            raise ConfigError(
                "--simulate-target, --simulate-draft: cannot be combined with --target"
            )
        options = replace(options, simulate_target=None, simulate_draft=None)
    if options.waiting is None:
        options = replace(options, waiting=options.generations // 4)
    return options


async def _measure(
    options: OverloadOptions, console: Console, document: Document
) -> list[PhaseResult]:
    from outrider.client.channel import open_channel
    from outrider_bench.loadtest.driver import loaded_orchestrators
    from outrider_bench.measuring.show import progress

    changes: dict[str, Any] = {
        "max_generations": options.generations,
        "max_waiting": options.waiting,
    }
    results: list[PhaseResult] = []
    async with measured_system(options, console, **changes) as system:
        document.about(system)
        death = asyncio.create_task(system.stack.next_death())
        try:
            async with open_channel(system.stack.endpoint) as channel:
                orchestrator = await loaded_orchestrators(channel)
                num_steps = 2 + 2 * options.repetitions
                expected_s = _WARM_UP_S + (num_steps - 1) * options.seconds
                with progress(console, num_steps, document, results, expected_s=expected_s) as step:
                    await _phases(options, system, orchestrator, document, step, results)
            if death.done():
                results[-1].deaths.append(str(death.result()[0]))
        finally:
            death.cancel()
            await asyncio.gather(death, return_exceptions=True)
    return results


async def _phases(
    options: OverloadOptions,
    system: System,
    orchestrator: LoadedOrchestrators,
    document: Document,
    step: Step,
    results: list[PhaseResult],
) -> None:
    """Runs capacity and overload alternately, then capacity again to check the recovery.

    Appends to `results`.
    """
    from outrider_bench.commands.overload_phases import PhaseResult

    step("warm-up")
    await at_capacity(options, orchestrator, 0, _WARM_UP_S)
    for repetition in range(options.repetitions):
        step("capacity")
        phase = await at_capacity(options, orchestrator, 1 + 2 * repetition, options.seconds)
        results.append(PhaseResult.of("capacity", phase.records, options.settle, options.seconds))
        _add_samples(document, results[-1].name, repetition, phase)
        # If the machine stalled and no request completed, assumes one request per phase.
        rate = options.factor * max(results[-1].requests_per_s, 1 / options.seconds)
        step(f"{rate:.1f} requests/s offered")
        phase = await beyond_capacity(options, orchestrator, 2 + 2 * repetition, rate)
        results.append(
            PhaseResult.of("overload", phase.records, options.settle, options.seconds, rate)
        )
        _add_samples(document, results[-1].name, repetition, phase)
    step("capacity, afterwards")
    phase = await at_capacity(options, orchestrator, 1 + 2 * options.repetitions, options.seconds)
    results.append(PhaseResult.of("afterwards", phase.records, options.settle, options.seconds))
    _add_samples(document, results[-1].name, options.repetitions, phase)
    results[-1].num_left_open = await _left_open(system)


def _workload(options: OverloadOptions) -> Workload:
    from outrider_bench.loadtest.lengths import Lengths
    from outrider_bench.loadtest.plan import Workload

    return Workload(
        input_len=Lengths.parse(str(options.prompt_len), "--prompt-len"),
        output_len=Lengths.parse(options.output_len, "--output-len"),
        num_turns=Lengths.parse("1", "turns"),
        seed=options.seed,
    )


def _phase(options: OverloadOptions, orchestrator: LoadedOrchestrators, number: int) -> Phase:
    from outrider_bench.loadtest.driver import Phase
    from outrider_bench.loadtest.requests import RequestOptions

    return Phase(orchestrator, RequestOptions(), number=number, seed=options.seed, run=options.name)


async def at_capacity(
    options: OverloadOptions, orchestrator: LoadedOrchestrators, number: int, seconds: float
) -> Phase:
    """Closed loop with as many clients as running generations: full, but nothing is queued."""
    from outrider_bench.loadtest.plan import endless

    visits = endless(_workload(options).conversations(1024))
    phase = _phase(options, orchestrator, number)
    await phase.closed_loop(visits, options.generations, until_s=seconds)
    return phase


async def beyond_capacity(
    options: OverloadOptions, orchestrator: LoadedOrchestrators, number: int, rate: float
) -> Phase:
    """Open loop at `rate` requests per second."""
    from outrider_bench.loadtest.plan import timed

    num = max(1, round(rate * options.seconds))
    visits = timed(
        _workload(options).conversations(num), rate, options.burstiness, seed=options.seed + number
    )
    phase = _phase(options, orchestrator, number)
    await phase.open_loop(visits)
    return phase


def _add_samples(document: Document, name: str, repetition: int, phase: Phase) -> None:
    from outrider_bench.loadtest.results import sample

    document.samples += [
        {"phase": name, "repetition": repetition} | sample(record) for record in phase.records
    ]


async def _left_open(system: System) -> int | None:
    """Generations still open at the target after the load has ended."""
    from outrider_bench.measuring.tiers import target_info

    num_open = 0
    for _ in range(int(_DRAIN_S / 0.1)):
        num_open = (await target_info(system.stack.addresses["target"])).load.num_open_generations
        if not num_open:
            break
        await asyncio.sleep(0.1)
    return num_open
