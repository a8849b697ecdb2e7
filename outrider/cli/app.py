"""The table of commands. Knows what each is called, not what it does."""

from __future__ import annotations

from typing import Annotated

import typer

from outrider import __version__
from outrider.cli.generate import generate
from outrider.cli.keys import keys
from outrider.cli.sessions import model, sessions
from outrider.cli.tokenizer import convert_tokenizer
from outrider.cli.top import top
from outrider.cli.up import up
from outrider_bench.chaos.command import chaos
from outrider_bench.commands import bench
from outrider_bench.commands.demo import demo
from outrider_bench.commands.quickstart import quickstart

app = typer.Typer(
    name="outrider",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Commands inherit the names.
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _outrider(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Distributed speculative decoding for large language models."""


app.command()(up)
app.command()(generate)
app.command()(demo)
app.command()(model)
app.command()(top)
app.command()(chaos)
app.command()(convert_tokenizer)
app.add_typer(sessions, name="session")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
app.add_typer(quickstart, name="quickstart")
