"""Commands of `outrider`: this package's own, and those of other packages by entry point.

A package adds a command with an entry point of the group `outrider.commands`: a function, or a
typer application for a command with subcommands. `outrider_bench` does so.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from outrider import __version__
from outrider.cli.generate import generate
from outrider.cli.keys import keys
from outrider.cli.models import convert_tokenizer, model
from outrider.cli.sessions import sessions
from outrider.cli.top import top
from outrider.cli.up import up

app = typer.Typer(
    name="outrider",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Commands inherit the names.
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _outrider(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Distributed speculative decoding for large language models."""


app.command()(up)
app.command()(generate)
app.command()(model)
app.command()(top)
app.command()(convert_tokenizer)
app.add_typer(sessions, name="session")
app.add_typer(keys, name="keys")


def _add(entry: EntryPoint) -> None:
    try:
        command = entry.load()
    except ImportError as error:  # the package does not fit this version; other commands work
        print(f"outrider: command {entry.name!r} cannot be loaded: {error}", file=sys.stderr)
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(entry.name)(command)


for _entry in sorted(entry_points(group="outrider.commands")):
    _add(_entry)
