"""`outrider demo`: compares speculative with plain decoding in about a minute."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.failures import Signalled
from outrider.cli.options import takes
from outrider.cli.stack_options import DEFAULT_INFLATE, StackOptions, private_stack

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client.client import Client, Output
    from outrider.v1.orchestrator_pb2 import GenerateRequest

PROMPTS = (
    'def fibonacci(n):\n    """Return',
    "import os\n\nclass Cache:\n    def __init__(self, size):\n",
)
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
        int, typer.Option(min=1, help="Outputs of each prompt with drafts, and as many without.")
    ] = 3
    seconds: Annotated[
        float,
        typer.Option(help="Time limit; every prompt is run at least once with and without drafts."),
    ] = 45.0
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt instead of the built-in ones; repeatable.")
    ] = None
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="0 is greedy; above 0: seeded sampling with coupled verification."
        ),
    ] = 0.0
    # Equality is guaranteed in float32 only: at lower precision, rounding depends on the batch.
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"


@dataclass
class Comparison:
    """Outputs of each prompt, with and without drafts. `stopped`: signal that ended the demo."""

    drafted: list[list[Output]] = field(default_factory=list)
    plain: list[list[Output]] = field(default_factory=list)
    stopped: Signalled | None = None

    @property
    def identical(self) -> bool:
        """Whether all outputs of each prompt have the same tokens."""
        return all(
            len({tuple(output.token_ids) for output in (*drafted, *plain)}) == 1
            for drafted, plain in zip(self.drafted, self.plain, strict=True)
            if drafted or plain
        )


@takes(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Start the quickstart pair, compare speculative with plain decoding, and stop it."""
    from rich.console import Console

    from outrider.cli.running import run

    comparison = run(_demo(options, Console()))
    if comparison.stopped is not None:
        raise comparison.stopped
    raise typer.Exit(0 if comparison.identical else 1)


async def _demo(options: DemoOptions, console: Console) -> Comparison:
    from outrider.cli.up import described_models, shown_stack
    from outrider.cli.view import StackView
    from outrider.client.client import connected

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
        connected(stack.endpoint) as client,
    ):
        comparison = await compare(client, options, console)
    console.print(_table(comparison, options))
    console.print(_summary(comparison), highlight=False)
    return comparison


async def compare(client: Client, options: DemoOptions, console: Console) -> Comparison:
    """Runs each prompt with and without drafts alternately.

    A busy machine then slows down both equally.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from outrider.cli.running import survive_signal

    deadline = time.monotonic() + options.seconds
    prompts = options.prompt or list(PROMPTS)
    comparison = Comparison([[] for _ in prompts], [[] for _ in prompts])
    for gamma in (options.gamma, 0):
        warm_up = replace(options, max_tokens=_NUM_WARM_UP_TOKENS)
        await client.generate(_request(prompts[0], gamma, warm_up))
    comparison.drafted[0].append(await _show_one(client, prompts[0], options, console))
    comparison.plain[0].append(await client.generate(_request(prompts[0], 0, options)))
    columns = (TextColumn("[dim]measuring[/]"), BarColumn(), MofNCompleteColumn())
    left = (TextColumn("[dim]left[/]"), TimeRemainingColumn())
    console.print(f"[dim]about {options.seconds:.0f} s more; Ctrl-C compares the outputs so far[/]")
    with Progress(*columns, *left, console=console, transient=True) as progress:
        runs = [i for _ in range(options.rounds) for i in range(len(prompts))][1:]
        try:
            for i in progress.track(runs):
                if comparison.plain[i] and time.monotonic() > deadline:
                    break
                for gamma, outputs in ((options.gamma, comparison.drafted), (0, comparison.plain)):
                    outputs[i].append(await client.generate(_request(prompts[i], gamma, options)))
        except asyncio.CancelledError:
            comparison.stopped = survive_signal()
            console.print("[yellow]stopped: compares the outputs so far[/]")
    return comparison


async def _show_one(client: Client, prompt: str, options: DemoOptions, console: Console) -> Output:
    from outrider.cli.paint import ColourWriter, legend

    painter = ColourWriter(console)
    console.print()
    console.print(legend())
    console.print(prompt, end="", style="dim", highlight=False, markup=False, soft_wrap=True)
    request = _request(prompt, options.gamma, options)
    output = await client.generate(request, show=painter.show)
    painter.end_line()
    console.print()
    return output


def _request(prompt: str, gamma: int | None, options: DemoOptions) -> GenerateRequest:
    """Greedy or coupled seeded request: in both cases drafts must not change the output."""
    from outrider.v1 import orchestrator_pb2, sampling_pb2

    request = orchestrator_pb2.GenerateRequest(text=prompt, gamma=gamma)
    request.verification = sampling_pb2.VERIFICATION_COUPLED
    request.sampling.temperature = options.temperature
    request.sampling.seed = _SEED
    request.sampling.max_tokens = options.max_tokens
    request.sampling.ignore_eos = True  # all outputs have the same length
    return request


def _speed(outputs: list[list[Output]]) -> float:
    """Median over all outputs of tokens per second after the first message."""
    return statistics.median(o.result.speculation.tokens_per_s for os in outputs for o in os)


def _table(comparison: Comparison, options: DemoOptions) -> Table:
    from rich.table import Table

    stats = [o.result.speculation for outputs in comparison.drafted for o in outputs]
    num_drafts = sum(s.num_drafts for s in stats)
    num_accepted = sum(s.num_accepted_tokens for s in stats)
    alpha = num_accepted / max(1, num_accepted + sum(s.num_rejected_tokens for s in stats))
    tau = 1 + num_accepted / max(1, num_drafts)
    drafted, plain = _speed(comparison.drafted), _speed(comparison.plain)
    table = Table(show_edge=False, header_style="bold")
    for name in ("", "tokens/s", "speed-up", "α accepted", "τ tokens per round"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("plain decoding", f"{plain:.1f}", "1.00×", "", "1.00")
    colour = "green" if drafted > plain else "red"
    speed_up = f"[bold {colour}]{drafted / plain:.2f}×[/]"
    name = "speculative" if options.gamma is None else f"speculative, γ {options.gamma}"
    table.add_row(name, f"{drafted:.1f}", speed_up, f"{alpha:.2f}", f"{tau:.2f}")
    return table


def _summary(comparison: Comparison) -> str:
    num_outputs = sum(map(len, comparison.drafted))
    if comparison.identical:
        return (
            f"[green]✔[/] {num_outputs} outputs each way, identical token for token "
            "[dim](medians of interleaved runs)[/]"
        )
    return "[bold red]✘ the outputs differ[/]: drafts must not change the output"
