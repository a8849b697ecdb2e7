"""`outrider quickstart train | info`: the model pair that is part of Outrider."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.failures import Signalled, require_engine
from outrider.errors import ConfigError
from outrider.quickstart_pair import PAIR_PATH

if TYPE_CHECKING:
    from outrider_bench.quickstart.train import TrainingConfig

quickstart = typer.Typer(
    help="The small model pair that is part of Outrider.", no_args_is_help=True
)


@quickstart.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the pair.")],
    seed: Annotated[int | None, typer.Option(help="Default: the seed of the shipped pair.")] = None,
    target: Annotated[
        Path | None,
        typer.Option(help="Target of an earlier run: train only a draft for it."),
    ] = None,
    packages: Annotated[
        str,
        typer.Option(help="Installed packages to train on beside the standard library: a,b,c."),
    ] = "",
    hours: Annotated[
        float | None,
        typer.Option(min=0.01, help="Train about this long. Default: up to 2 h 15 min."),
    ] = None,
) -> None:
    """Train the pair from scratch on this machine.

    A run that was interrupted or killed goes on with the same command.
    """
    require_engine()
    if target is not None and not (target / "config.json").exists():
        raise ConfigError(f"--target: {target} is not a model directory: it has no config.json")
    from outrider_bench.quickstart.train import TrainingConfig

    config = TrainingConfig(packages=tuple(name for name in packages.split(",") if name))
    if seed is not None:
        config = replace(config, seed=seed)
    if hours is not None:
        config = config.lasting(hours)
    made(out, config, trained_target=target)


def made(out: Path, config: TrainingConfig, **more: Any) -> None:
    """Runs `make` with the arguments `more`. Raises Signalled after Ctrl-C."""
    from outrider_bench.quickstart.make import make  # imports torch

    try:
        is_cut = make(out, config, **more).is_cut
    except KeyboardInterrupt:
        is_cut = True
    if is_cut:
        raise Signalled(signal.SIGINT)


@quickstart.command()
def info() -> None:
    """Show the model card of the pair: purpose, training data, measurements."""
    from rich.console import Console
    from rich.markdown import Markdown

    try:
        card = (PAIR_PATH / "CARD.md").read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"the quickstart pair has no model card: {error}") from error
    console = Console()
    if console.is_terminal:
        console.print(Markdown(card))
    else:
        typer.echo(card, nl=False)
