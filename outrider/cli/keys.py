"""`outrider keys new`: a key for a caller, and the line by which the orchestrator knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(help="Keys of those who may call an orchestrator.", no_args_is_help=True)


@keys.callback()
def _keys() -> None:
    """Makes typer keep `new` as a command of its own."""


@keys.command()
def new(
    name: Annotated[str, typer.Argument(help="The caller; keys of one name share its sessions.")],
    streams: Annotated[int | None, typer.Option(help="Most generations at a time.", min=1)] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Of prompts and outputs together, over time.", min=1)
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(help="Most sessions. Default: the orchestrator's.", min=1)
    ] = None,
    min_priority: Annotated[
        int | None,
        typer.Option(help="Lowest priority number that counts against other callers. Default 0."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Adds the line to this --api-keys-file.", dir_okay=False)
    ] = None,
) -> None:
    """Make a key: the key on standard output, its line for --api-keys-file on standard error.

    Nothing keeps the key; the line is no secret.
    """
    from outrider.security.keys import KeyLimits, add_key, new_key

    secret, line = new_key(name, KeyLimits(streams, tokens_per_minute, sessions, min_priority))
    if file is None:
        typer.echo(str(line), err=True)
    else:
        add_key(str(file), line)
    typer.echo(secret)
