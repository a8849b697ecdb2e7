"""`outrider quickstart train | info`: the pair that comes with Outrider."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.failures import Signalled
from outrider.cli.stack_options import PAIR_PATH
from outrider.errors import ConfigError

quickstart = typer.Typer(
    help="The small model pair that comes with Outrider.", no_args_is_help=True
)


@quickstart.command()
def train(
    out: Annotated[Path, typer.Option(help="Where the pair is written.")],
    seed: Annotated[int | None, typer.Option(help="Default: the shipped pair's.")] = None,
) -> None:
    """Train the pair from nothing on this machine; takes about an hour on two cores."""
    from outrider.engine.quickstart.train import main  # the one place of the CLI with torch

    typer.echo("about an hour on two cores; Ctrl-C keeps the target's last checkpoint")
    try:
        main(["--out", str(out), *([] if seed is None else ["--seed", str(seed)])])
    except KeyboardInterrupt:
        made = [name for name in ("target", "draft") if (out / name / "config.json").exists()]
        typer.echo(f"stopped; in {out}: {', '.join(made) or 'nothing yet'}", err=True)
        raise Signalled(signal.SIGINT) from None


@quickstart.command()
def info() -> None:
    """Show the pair's card: what it is, what it was trained on, what was measured."""
    from rich.console import Console
    from rich.markdown import Markdown

    try:
        card = (PAIR_PATH / "CARD.md").read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"the quickstart pair has no card: {error}") from error
    console = Console()
    if console.is_terminal:
        console.print(Markdown(card))
    else:
        typer.echo(card, nl=False)
