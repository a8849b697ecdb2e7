"""`outrider bench signals`: scales each tier alone and records its autoscaling signal.

Owns the points and their load. `fleet` runs the replicas; `bottlenecks` evaluates the results. The
tiers are simulated; the services and the network are real. Signals are read from the replicas'
counters, which are also the source of their metrics.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider_bench.commands.bottlenecks import MAX_REPLICAS, REGIMES, Point, Regime, sizes
from outrider_bench.measuring.cores import CoreUse
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    import grpc
    from rich.console import Console

    from outrider_bench.commands.fleet import ReadInfo
    from outrider_bench.measuring.document import Document

# Interval between two readings of the counters.
_INTERVAL_S = 0.1
# Small enough that 64 sessions show in KV use, large enough that none is evicted.
_KV_TOKENS = 12_288


@dataclass(frozen=True)
class SignalsOptions(BenchOptions):
    """Flags of `outrider bench signals`."""

    cores: Annotated[
        CoreUse, typer.Option(help="shared: no pinning; simulated passes need no core.")
    ] = CoreUse.shared
    replicas: Annotated[
        int, typer.Option(min=2, max=MAX_REPLICAS, help="Maximum number of replicas of a tier.")
    ] = MAX_REPLICAS
    seconds: Annotated[float, typer.Option(min=1, help="Duration of each point.")] = 15.0
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds not counted at the begin of a point.")
    ] = 5.0
    output_len: Annotated[
        str, typer.Option(help="Tokens per output; format as in `outrider bench serve`.")
    ] = "uniform:64:128"
    name: Annotated[str, typer.Option(help="Name of the files.")] = "signals"


@takes(SignalsOptions)
def signals(options: SignalsOptions) -> None:
    """Measure tokens/s and autoscaling signals by replicas of each tier; the tiers are simulated.

    Three loads: the draft is the bottleneck, the target is, or neither.
    """
    from outrider.cli.running import run
    from outrider_bench.commands.bottlenecks import goals, panels, table
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    _check(options)
    options = options.with_quick_defaults(seconds=2.0, settle=0.5, replicas=2, output_len="16")
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    points = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [
            asdict(p) | {"draft_signal": p.draft_signal, "target_signal": p.target_signal}
            for p in points
        ]
        document.add_goals(lambda: goals(points))
        document.write()
        draw(document.plot_path, "Each tier scaled alone", panels(points))
        finish(console, document, [table(points)])


def _check(options: SignalsOptions) -> None:
    from outrider_bench.loadtest.lengths import Lengths

    options.refuse_models()
    if options.settle >= options.seconds:
        raise ConfigError("--settle: must be less than --seconds")
    Lengths.parse(options.output_len, "--output-len")


async def _measure(options: SignalsOptions, console: Console, document: Document) -> list[Point]:
    from outrider_bench.commands.fleet import running_fleet
    from outrider_bench.measuring.cores import core_per_tier
    from outrider_bench.measuring.show import progress

    points: list[Point] = []
    given = replace(options, kv_cache_tokens=options.kv_cache_tokens or _KV_TOKENS)
    stack_options = given.stack_options(core_per_tier(options.cores))
    num, ways = options.replicas, sizes(options.replicas)
    num_steps = len(REGIMES) * len(ways)
    expected_s = num_steps * options.seconds
    with progress(console, num_steps, document, points, expected_s=expected_s) as step:
        for regime in REGIMES:
            log_dir = options.out / "logs" / regime.name.replace(" ", "-")
            tiers = {"target": regime.target, "draft": regime.draft}
            async with running_fleet(stack_options, log_dir, num, **tiers) as fleet:
                for num_targets, num_drafts in ways:
                    step(f"{regime.name}: {num_targets} target, {num_drafts} draft replicas")
                    seen = Watch(fleet.targets[:num_targets], fleet.drafts[:num_drafts])
                    async with fleet.orchestrator(num_targets, num_drafts) as channel:
                        points.append(
                            await measured_point(options, regime, seen, channel, len(points))
                        )
                    document.samples += [
                        {"point": len(points) - 1, "regime": regime.name} | reading
                        for reading in seen.readings
                    ]
    return points


async def measured_point(
    options: SignalsOptions, regime: Regime, seen: Watch, channel: grpc.aio.Channel, number: int
) -> Point:
    """Runs a closed loop of the regime's sessions and measures it after the settling time."""
    from outrider_bench.loadtest.driver import Phase, loaded_orchestrators
    from outrider_bench.loadtest.lengths import Lengths
    from outrider_bench.loadtest.measures import Summary, tokens_per_s
    from outrider_bench.loadtest.plan import Workload, endless
    from outrider_bench.loadtest.requests import RequestOptions

    workload = Workload(
        input_len=Lengths.parse(str(options.prompt_len), "--prompt-len"),
        output_len=Lengths.parse(options.output_len, "--output-len"),
        num_turns=Lengths.parse("1", "turns"),
        seed=options.seed,
    )
    orchestrator = await loaded_orchestrators(channel)
    phase = Phase(
        orchestrator, RequestOptions(), number=number, seed=options.seed, run=options.name
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(seen.watch(options.settle, options.seconds))
        visits = endless(workload.conversations(512))
        await phase.closed_loop(visits, regime.num_sessions, until_s=options.seconds)
    # Requests sent early in the settling time still reflect the previous state.
    own = [record for record in phase.records if record.intended_s >= options.settle / 2]
    summary = Summary.of(own, options.seconds)
    drafting = summary.drafting
    return Point(
        regime=regime.name,
        num_targets=len(seen.targets),
        num_drafts=len(seen.drafts),
        num_sessions=regime.num_sessions,
        tokens_per_s=tokens_per_s(phase.records, options.settle, options.seconds),
        draft_queue=seen.mean("draft_queue"),
        hit_rate=1.0 if drafting is None or drafting.hit_rate is None else drafting.hit_rate,
        waiting_rows=seen.mean("waiting_rows"),
        kv_use=seen.mean("kv_use"),
        mean_gamma=drafting.mean_gamma if drafting is not None else None,
        errors=summary.errors,
    )


@dataclass
class Watch:
    """Reads the counters of the replicas in use."""

    targets: Sequence[ReadInfo]
    drafts: Sequence[ReadInfo]
    readings: list[dict[str, float]] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """Mean over time of the mean over the replicas."""
        return statistics.fmean(reading[name] for reading in self.readings)

    async def watch(self, begin_s: float, end_s: float) -> None:
        """Reads the counters from `begin_s` to `end_s` seconds from now, at least once."""
        now = time.monotonic()
        await asyncio.sleep(begin_s)
        while True:
            self.readings.append(await self._read())
            if time.monotonic() >= now + end_s:
                return
            await asyncio.sleep(_INTERVAL_S)

    async def _read(self) -> dict[str, float]:
        targets, drafts = await asyncio.gather(
            asyncio.gather(*(read() for read in self.targets)),
            asyncio.gather(*(read() for read in self.drafts)),
        )
        return {
            "draft_queue": statistics.fmean(d.load.num_waiting_generations for d in drafts),
            "waiting_rows": statistics.fmean(t.load.num_waiting_rows for t in targets),
            "kv_use": statistics.fmean(
                t.load.kv_used_tokens / t.model.kv_capacity_tokens for t in targets
            ),
        }
