"""`outrider demo`: compares speculative with plain decoding in about a minute."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import takes
from outrider.cli.running import survive_signal
from outrider.cli.stack_options import DEFAULT_INFLATE, StackOptions, private_stack

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client import AsyncClient, Generation
    from outrider.v1.orchestrator_pb2 import GenerateRequest

PROMPTS = (
    'def fibonacci(n):\n    """Return',
    "import os\n\nclass Cache:\n    def __init__(self, size):\n",
)
# Greedy text of so small a model repeats itself; sampled text reads like code.
_TEMPERATURES = (0.0, 0.7)
_NUM_WARM_UP_TOKENS = 16
_SEED = 1


@dataclass(frozen=True)
class DemoOptions:
    """Flags of `outrider demo`."""

    inflate: Annotated[
        str,
        typer.Option(help="Cost of the target in parameters, for example 300M; 0: its real cost."),
    ] = DEFAULT_INFLATE
    gamma: Annotated[
        int | None,
        typer.Option(min=1, help="Draft tokens per round. Default: adaptive."),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per output.")] = 128
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Outputs of each prompt and temperature with drafts, and as many without."
        ),
    ] = 3
    seconds: Annotated[
        float,
        typer.Option(help="Time limit; the first prompt is run at least once in each way."),
    ] = 45.0
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt instead of the built-in ones; repeatable.")
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0 is greedy; above 0: seeded sampling with coupled verification. Default: both, "
            "at 0 and 0.7.",
        ),
    ] = None
    # Equality is guaranteed in float32 only: at lower precision, rounding depends on the batch.
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"


@dataclass
class Comparison:
    """Outputs of one prompt at one temperature, with and without drafts."""

    prompt: str
    temperature: float
    drafted: list[Generation] = field(default_factory=list)
    plain: list[Generation] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether all outputs have the same tokens."""
        return len({tuple(output.token_ids) for output in (*self.drafted, *self.plain)}) <= 1


@dataclass
class Results:
    """All comparisons, those of the first prompt first. `stopped`: signal that ended the demo."""

    comparisons: list[Comparison]
    stopped: Exception | None = None

    @property
    def identical(self) -> bool:
        """Whether drafts changed no output."""
        return all(comparison.identical for comparison in self.comparisons)

    def by_temperature(self) -> dict[float, list[Comparison]]:
        """The comparisons that have outputs."""
        found: dict[float, list[Comparison]] = {}
        for comparison in self.comparisons:
            if comparison.plain:
                found.setdefault(comparison.temperature, []).append(comparison)
        return found


@takes(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Start the quickstart pair, compare speculative with plain decoding, and stop it."""
    from rich.console import Console

    from outrider.cli.running import run

    results = run(_demo(options, Console()))
    if results.stopped is not None:
        raise results.stopped
    raise typer.Exit(0 if results.identical else 1)


async def _demo(options: DemoOptions, console: Console) -> Results:
    from outrider.cli.up import described_models, shown_stack
    from outrider.cli.view import StackView
    from outrider.client import AsyncClient

    stack_options = private_stack(
        StackOptions(inflate=options.inflate, dtype=options.dtype, device=options.device)
    )
    view = StackView(console, models=described_models(stack_options))
    console.print(
        f"[dim]starting four programs, then comparing for about {options.seconds:.0f} s; Ctrl-C "
        "stops[/]",
        highlight=False,
    )
    async with (
        shown_stack(stack_options, view) as stack,
        AsyncClient(stack.endpoint, resume_for_s=0.0) as client,
    ):
        results = await compare(client, options, console)
    console.print(_table(results, options))
    console.print(_summary(results), highlight=False)
    return results


async def compare(client: AsyncClient, options: DemoOptions, console: Console) -> Results:
    """Runs each prompt with and without drafts alternately.

    A busy machine then slows down both equally.
    """
    deadline = time.monotonic() + options.seconds
    temperatures = _TEMPERATURES if options.temperature is None else (options.temperature,)
    results = Results([Comparison(p, t) for p in options.prompt or PROMPTS for t in temperatures])
    shown = results.comparisons[: len(temperatures)]
    for gamma in (options.gamma, 0):
        warm_up = replace(options, max_tokens=_NUM_WARM_UP_TOKENS)
        await client.stream(_request(shown[0], gamma, warm_up)).result()
    for comparison in shown:
        comparison.drafted.append(await _show_one(client, comparison, options, console))
        plain = client.stream(_request(comparison, 0, options))
        comparison.plain.append(await plain.result())
    runs = (results.comparisons * options.rounds)[len(shown) :]
    left_s = max(0.0, deadline - time.monotonic())
    console.print(f"[dim]about {left_s:.0f} s more; Ctrl-C compares the outputs so far[/]")
    try:
        await _run_all(client, runs, deadline, options, console)
    except asyncio.CancelledError:
        results.stopped = survive_signal()
        console.print("[yellow]stopped: compares the outputs so far[/]")
    return results


async def _run_all(
    client: AsyncClient,
    runs: list[Comparison],
    deadline: float,
    options: DemoOptions,
    console: Console,
) -> None:
    """Adds an output of each kind to each comparison, until the deadline."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("[dim]measuring[/]"), BarColumn(), MofNCompleteColumn())
    left = (TextColumn("[dim]left[/]"), TimeRemainingColumn())
    with Progress(*columns, *left, console=console, transient=True) as progress:
        for comparison in progress.track(runs):
            if time.monotonic() > deadline:
                break
            for gamma, outputs in ((options.gamma, comparison.drafted), (0, comparison.plain)):
                stream = client.stream(_request(comparison, gamma, options))
                outputs.append(await stream.result())


async def _show_one(
    client: AsyncClient, comparison: Comparison, options: DemoOptions, console: Console
) -> Generation:
    from outrider.cli.paint import ColourWriter, legend

    painter = ColourWriter(console)
    console.print()
    console.print(f"[bold]{_way(comparison.temperature)}[/]", highlight=False)
    console.print(legend())
    console.print(
        comparison.prompt, end="", style="dim", highlight=False, markup=False, soft_wrap=True
    )
    stream = client.stream(_request(comparison, options.gamma, options))
    async for chunk in stream:
        painter.show(chunk)
    painter.end_line()
    console.print()
    return await stream.result()


def _way(temperature: float) -> str:
    return f"sampled at T = {temperature:g}, seed {_SEED}" if temperature else "greedy"


def _request(comparison: Comparison, gamma: int | None, options: DemoOptions) -> GenerateRequest:
    """Greedy or coupled seeded request: in both cases drafts must not change the output."""
    from outrider.v1 import orchestrator_pb2, sampling_pb2

    request = orchestrator_pb2.GenerateRequest(text=comparison.prompt, gamma=gamma)
    request.verification = sampling_pb2.VERIFICATION_COUPLED
    request.sampling.temperature = comparison.temperature
    request.sampling.seed = _SEED
    request.sampling.max_tokens = options.max_tokens
    request.sampling.ignore_eos = True  # all outputs have the same length
    return request


def _speed(outputs: list[Generation]) -> float:
    """Median of tokens per second after the first message."""
    return statistics.median(output.speculation.tokens_per_s or 0.0 for output in outputs)


def _table(results: Results, options: DemoOptions) -> Table:
    from rich.table import Table

    table = Table(show_edge=False, header_style="bold")
    for name in ("", "tokens/s", "speed-up", "α accepted", "τ tokens per round"):
        table.add_column(name, justify="right" if name else "left")
    gamma = "" if options.gamma is None else f", γ {options.gamma}"
    for temperature, comparisons in results.by_temperature().items():
        way = f"T = {temperature:g}" if temperature else "greedy"
        drafted_outputs = [output for one in comparisons for output in one.drafted]
        drafted = _speed(drafted_outputs)
        plain = _speed([output for one in comparisons for output in one.plain])
        stats = [output.speculation for output in drafted_outputs]
        num_accepted = sum(s.num_accepted_tokens for s in stats)
        num_verified = num_accepted + sum(s.num_rejected_tokens for s in stats)
        alpha = num_accepted / max(1, num_verified)
        tau = 1 + num_accepted / max(1, sum(s.num_drafts for s in stats))
        colour = "green" if drafted > plain else "red"
        speed_up = f"[bold {colour}]{drafted / plain:.2f}×[/]"
        table.add_row(f"plain, {way}", f"{plain:.1f}", "1.00×", "", "1.00")
        table.add_row(
            f"speculative, {way}{gamma}", f"{drafted:.1f}", speed_up, f"{alpha:.2f}", f"{tau:.2f}"
        )
    return table


def _summary(results: Results) -> str:
    num_outputs = sum(len(comparison.drafted) for comparison in results.comparisons)
    if results.identical:
        return (
            f"[green]✔[/] {num_outputs} outputs each way, identical token for token "
            "[dim](medians of interleaved runs)[/]"
        )
    return "[bold red]✘ the outputs differ[/]: drafts must not change the output"
