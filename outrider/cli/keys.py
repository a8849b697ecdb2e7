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
        int | None, typer.Option(help="Most generations at a time. Default: no limit.", min=1)
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(help="Most prompt and output tokens per minute. Default: no limit.", min=1),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(
            help="Most sessions. Default: the orchestrator's max_sessions_per_key.", min=1
        ),
    ] = None,
    min_priority: Annotated[
        int | None,
        typer.Option(
            help="Smallest priority number that counts against other keys; lower runs first. "
            "Default: 0."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Keys file (--api-keys-file) to add the line to.", dir_okay=False),
    ] = None,
) -> None:
    """Make an API key. Prints the key to standard output, its line to standard error.

    The line belongs into the orchestrator's --api-keys-file. It has only the key's digest and is
    not a secret. The key itself is not stored.
    """
    from outrider.security.keys import KeyLimits, add_key, new_key

    secret, line = new_key(name, KeyLimits(streams, tokens_per_minute, sessions, min_priority))
    if file is None:
        typer.echo(str(line), err=True)
    else:
        add_key(str(file), line)
    typer.echo(secret)
