"""`outrider bench rounds`: CPU time, added latency and memory of the orchestrator per round.

CPU time is read in short windows. Simulated tiers use almost no CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_list, takes
from outrider_bench.measuring.cores import core_for_orchestrator
from outrider_bench.measuring.process import cpu_seconds, memory_bytes
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Block
    from outrider_bench.measuring.summary import Rounds

_WINDOW_S = 0.1
# Windows with fewer rounds are extended; they occur at the begin and end of a run.
_MIN_ROUNDS = 5
_NUM_WARM_UP_TOKENS = 32
# Tiers like two GPUs: passes of 25 ms and more by rows, a draft ten times faster.
SIMULATED = {
    "simulate_target": "step_ms=25,row_ms=0.5",
    "simulate_draft": "step_ms=2.5,row_ms=0.05",
}


@dataclass(frozen=True)
class RoundsOptions(BenchOptions):
    """Flags of `outrider bench rounds`."""

    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams: 1,64,1000.")] = (
        "1,64,1000"
    )
    gamma: Annotated[
        int | None, typer.Option(min=0, help="Draft tokens per round. Default: adaptive.")
    ] = None
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0
    name: Annotated[str, typer.Option(help="Name of the files.")] = "rounds"


@dataclass(frozen=True)
class Window:
    """About 0.1 s of the orchestrator: its CPU time and the number of rounds of all sessions."""

    seconds: float
    cpu_s: float
    num_rounds: int

    @property
    def cpu_us_per_round(self) -> float:
        return 1e6 * self.cpu_s / self.num_rounds


@dataclass(frozen=True)
class RoundCost:
    """A table row. CPU times are in microseconds per round of a session.

    `added_ms`: latency of a round beyond the target's pass. With many streams it is mostly the wait
    for the running pass.
    """

    num_streams: int
    num_windows: int
    cpu_us_median: float | None
    cpu_us_p99: float | None
    cpu_us_mean: float
    cpu_share: float
    rounds_per_s: float
    tokens_per_s: float
    added_ms: float
    memory_bytes: int
    rounds: Rounds


@takes(RoundsOptions)
def rounds(options: RoundsOptions) -> None:
    """Measure the orchestrator's CPU time, added latency and memory per round of a session.

    The tiers are simulated unless models are given.
    """
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import Line, Panel, draw, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(streams="1,4")
    if options.target is None and not options.is_simulated:
        simulated: dict[str, Any] = {**SIMULATED}
        options = replace(options, **simulated)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    costs = run(_measure(options, console, document))
    with reporting(console, document):
        document.results += [asdict(cost) for cost in costs]
        document.add_goals(lambda: _goals(costs))
        document.write()
        streams = [cost.num_streams for cost in costs]
        lines = [
            Line("median", streams, [cost.cpu_us_median or 0.0 for cost in costs]),
            Line("p99", streams, [cost.cpu_us_p99 or 0.0 for cost in costs]),
        ]
        panel = Panel("streams", "CPU µs per session round", lines, is_log_x=True)
        draw(document.plot_path, "CPU cost of the orchestrator", [panel])
        finish(console, document, [_table(costs)])


async def _measure(options: RoundsOptions, console: Console, document: Document) -> list[RoundCost]:
    from outrider_bench.measuring.show import progress

    streams = parse_list(options.streams, "--streams", int)
    costs: list[RoundCost] = []
    async with measured_system(
        options, console, core_for_orchestrator, max_generations=max(256, *streams)
    ) as system:
        document.about(system)
        num_steps = len(streams) * (1 + options.repetitions)
        mean = (_NUM_WARM_UP_TOKENS + options.repetitions * options.max_tokens) / (
            1 + options.repetitions
        )
        warm_up = (1, mean / _NUM_WARM_UP_TOKENS)
        with progress(console, num_steps, document, costs, warm_up=warm_up) as step:
            for num_streams in streams:
                step(f"warm-up: {num_streams} streams")
                await _block(system, options, num_streams, _NUM_WARM_UP_TOKENS)
                windows: list[Window] = []
                blocks: list[Block] = []
                try:
                    for _ in range(options.repetitions):
                        step(f"{num_streams} streams")
                        async with _watched(system, windows):
                            blocks.append(
                                await _block(system, options, num_streams, options.max_tokens)
                            )
                finally:
                    if blocks:  # fewer than --repetitions after a signal
                        costs.append(_cost(system, num_streams, windows, blocks))
                        document.samples += [
                            {"num_streams": num_streams, "window": asdict(window)}
                            for window in windows
                        ]
    return costs


async def _block(system: System, options: RoundsOptions, num: int, max_tokens: int) -> Block:
    from outrider_bench.measuring.load import Work, run_block
    from outrider_bench.measuring.workload import Variant

    variant = Variant("streams", gamma=options.gamma, temperature=options.temperature)
    works = [Work(variant, i, system.prompts.ids(i), max_tokens, seed=i) for i in range(num)]
    return await run_block(system, works, num)


@contextlib.asynccontextmanager
async def _watched(system: System, windows: list[Window]) -> AsyncIterator[None]:
    """Appends a window every 0.1 s while the body runs, and the last window at its end.

    Rounds are counted as verify requests that the target has answered: one per session and round.
    """
    import grpc

    from outrider.client.connection import SHORT_TIMEOUT_S
    from outrider.v1 import target_pb2, target_pb2_grpc

    pid = system.stack.pid("orchestrator")
    async with grpc.aio.insecure_channel(system.stack.addresses["target"]) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        request = target_pb2.TargetServiceGetModelInfoRequest()

        async def read() -> tuple[float, float, int]:
            response = await stub.GetModelInfo(request, timeout=SHORT_TIMEOUT_S)
            return time.monotonic(), cpu_seconds(pid), response.load.num_rows_total

        previous = await read()

        async def add_window() -> None:
            nonlocal previous
            now = await read()
            seconds, cpu_s, num_rounds = (b - a for a, b in zip(previous, now, strict=True))
            if num_rounds >= _MIN_ROUNDS:
                windows.append(Window(seconds, cpu_s, int(num_rounds)))
                previous = now

        async def watch() -> None:
            while True:
                await asyncio.sleep(_WINDOW_S)
                await add_window()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await add_window()


def _cost(
    system: System, num_streams: int, windows: list[Window], blocks: list[Block]
) -> RoundCost:
    import numpy as np

    from outrider_bench.measuring.summary import Rounds

    costs = [window.cpu_us_per_round for window in windows]
    num_rounds = sum(window.num_rounds for window in windows)
    seconds = sum(window.seconds for window in windows)
    cpu_s = sum(window.cpu_s for window in windows)
    summed = Rounds.of(sample for block in blocks for sample in block.samples)
    assert summed is not None, "the orchestrator reports statistics of every output"
    return RoundCost(
        num_streams=num_streams,
        num_windows=len(windows),
        cpu_us_median=float(np.median(costs)) if costs else None,
        cpu_us_p99=float(np.percentile(costs, 99)) if costs else None,
        cpu_us_mean=1e6 * cpu_s / max(1, num_rounds),
        cpu_share=cpu_s / max(seconds, 1e-9),
        rounds_per_s=num_rounds / max(seconds, 1e-9),
        tokens_per_s=sum(block.tokens_per_s for block in blocks) / len(blocks),
        added_ms=1e3 * (summed.verify_s - summed.target_step_s),
        memory_bytes=memory_bytes(system.stack.pid("orchestrator"))[0],
        rounds=summed,
    )


def _goals(costs: list[RoundCost]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    goals = []
    for cost in costs:
        if cost.num_streams == 1:
            goals.append(Goal("ms added per round, 1 session", 1.5, cost.added_ms, is_most=True))
        if cost.num_streams == 64:
            text = "CPU µs per session round, 64 sessions"
            goals.append(Goal(f"{text}, median", 300, cost.cpu_us_median, is_most=True))
            goals.append(Goal(f"{text}, p99", 1000, cost.cpu_us_p99, is_most=True))
        if cost.num_streams >= 1000:
            # A rejected or failed stream would have ended the measurement.
            goals.append(Goal("concurrent streams of one process", 1000, float(cost.num_streams)))
    return goals


def _table(costs: list[RoundCost]) -> Table:
    from outrider_bench.measuring.show import number, share, table

    columns = ("streams", "CPU µs median", "p99", "mean", "of one core", "added ms", "rounds/s")
    shown = table("the orchestrator, per round of a session", (*columns, "tokens/s", "MB"))
    for cost in costs:
        shown.add_row(
            str(cost.num_streams), number(cost.cpu_us_median, 0), number(cost.cpu_us_p99, 0),
            number(cost.cpu_us_mean, 0), share(cost.cpu_share), number(cost.added_ms, 2),
            number(cost.rounds_per_s, 0), number(cost.tokens_per_s, 0),
            number(cost.memory_bytes / 1e6, 0),
        )  # fmt: skip
    return shown
