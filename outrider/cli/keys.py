"""`outrider keys new`: makes an API key and its line for the orchestrator's keys file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(help="Make API keys for clients of an orchestrator.", no_args_is_help=True)


@keys.callback()
def _keys() -> None:
    """Makes typer keep `new` as a subcommand although it is the only one."""


@keys.command()
def new(
    name: Annotated[
        str, typer.Argument(help="Client name. Keys with the same name share sessions.")
    ],
    streams: Annotated[
        int | None, typer.Option(help="Maximum generations at a time. Default: no limit.", min=1)
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(help="Maximum prompt and output tokens per minute. Default: no limit.", min=1),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            help="Maximum sessions. Default: the orchestrator's max_sessions_per_key.", min=1
        ),
    ] = None,
    min_priority: Annotated[
        int | None,
        typer.Option(
            help="Smallest priority number that the key may use against other keys; smaller "
            "ones order its own requests only. Lower runs first. Default: 0."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Keys file to add the line to, instead of printing it.", dir_okay=False),
    ] = None,
) -> None:
    """Make an API key, and print it to standard output. The key is not stored.

    Its line for the orchestrator's --api-keys-file goes to standard error. The line has only the
    key's digest: it is not a secret.
    """
    from outrider.security.keys import KeyLimits, add_key, new_key

    secret, line = new_key(name, KeyLimits(streams, tokens_per_minute, sessions, min_priority))
    if file is None:
        typer.echo(str(line), err=True)
    else:
        add_key(str(file), line)
    typer.echo(secret)
