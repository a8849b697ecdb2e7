"""Commands of `outrider`: this package's own, and those of other packages by entry point.

A package adds a command with an entry point of the group `outrider.commands`: a function, or a
typer application for a command with subcommands. `outrider_bench` does so. Such packages are not
imported when a command of this package runs: that would delay its start.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from outrider import __version__
from outrider.cli.audit import audit
from outrider.cli.drafts import drafts
from outrider.cli.generate import generate
from outrider.cli.keys import keys
from outrider.cli.models import convert_tokenizer, model
from outrider.cli.sessions import sessions
from outrider.cli.top import top
from outrider.cli.up import up

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_app = typer.Typer(
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


@_app.callback()
def _outrider(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Distributed speculative decoding for large language models."""


_app.command("up")(up)
_app.command("generate")(generate)
_app.command("model")(model)
_app.command("audit")(audit)
_app.command("top")(top)
_app.command("convert-tokenizer")(convert_tokenizer)
_app.add_typer(sessions, name="session")
_app.add_typer(drafts, name="drafts")
_app.add_typer(keys, name="keys")
_OWN_COMMANDS = {command.name for command in _app.registered_commands}
_OWN_COMMANDS |= {group.name for group in _app.registered_groups}


def app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The application that runs the arguments, which it does not parse itself.

    It has the commands of other packages too, unless `arguments` start with a command of this one.
    """
    if not _OWN_COMMANDS.intersection(arguments[:1]):
        _add_installed_commands()
    return _app


@functools.cache
def _add_installed_commands() -> None:
    from importlib.metadata import entry_points

    for entry in sorted(entry_points(group="outrider.commands")):
        _add(entry)


def _add(entry: EntryPoint) -> None:
    try:
        command = entry.load()
    except ImportError as error:  # the package does not fit this version; other commands work
        print(f"outrider: command {entry.name!r} cannot be loaded: {error}", file=sys.stderr)
        return
    if isinstance(command, typer.Typer):
        _app.add_typer(command, name=entry.name)
    else:
        _app.command(entry.name)(command)
