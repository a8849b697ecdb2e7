"""`outrider generate`: one output, streamed to a person, to a pipe or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from outrider.cli.failures import CallFailed
from outrider.cli.options import takes
from outrider.cli.request import GenerateOptions, build_request

if TYPE_CHECKING:
    from outrider.cli.client import Output
    from outrider.cli.paint import Painter, Plain


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Continue a prompt, and say how speculation went.

    On a terminal, colours tell accepted draft tokens from those of the target. Elsewhere standard
    output gets the text alone, standard error the summary.
    """
    from outrider.cli.result import finish_reason, to_dict
    from outrider.cli.running import run

    output = run(_generate(options))
    if options.json:
        typer.echo(json.dumps(to_dict(output), ensure_ascii=False))
    else:
        if options.token_ids is not None and not output.text:  # a model without a tokenizer
            typer.echo(",".join(map(str, output.token_ids)))
        summarise(output)
    if finish_reason(output.result) == "cancelled":
        raise CallFailed("CANCELLED: the server is stopping; the output is incomplete")


async def _generate(options: GenerateOptions) -> Output:
    from outrider.cli.client import connected

    request = build_request(options)
    async with connected(options.endpoint) as client:
        if options.json:
            return await client.generate(request, timeout_s=options.timeout)
        writer = _writer()
        try:
            return await client.generate(request, show=writer.show, timeout_s=options.timeout)
        finally:
            writer.end_line()


def _writer() -> Painter | Plain:
    from rich.console import Console

    from outrider.cli.paint import Painter, Plain

    console = Console()
    return Painter(console) if console.is_terminal else Plain()


def summarise(output: Output) -> None:
    """On standard error: standard output may be a file."""
    from rich.console import Console
    from rich.markup import escape

    from outrider.cli.paint import legend
    from outrider.cli.result import summary

    console = Console(stderr=True, highlight=False)
    console.print()
    if console.is_terminal:
        console.print(legend())
    for name, value in summary(output):
        console.print(f"[dim]{name:<8}[/]{escape(value)}", soft_wrap=True)
