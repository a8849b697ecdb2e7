"""`outrider distill`: trains a draft on its target's own behaviour."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.access import CONNECTION, AccessOptions
from outrider.cli.failures import Signalled, require_engine
from outrider.cli.options import parse_list, takes

if TYPE_CHECKING:
    from outrider_bench.distill.settings import DistillSettings

_TRAINING = "Training"


@dataclass(frozen=True, kw_only=True)
class DistillOptions(AccessOptions):
    """Flags of `outrider distill`."""

    target: Annotated[str, typer.Argument(help="Target: local directory or Hub name.")]
    out: Annotated[Path, typer.Option(help="Folder for the new draft.")]
    draft: Annotated[
        str | None, typer.Option(help="Draft to start from: local directory or Hub name.")
    ] = None
    from_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Start from this many of the target's first layers instead."),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to continue: one per line; .jsonl: strings, or objects with prompt, "
            "messages or token_ids."
        ),
    ] = None
    traffic: Annotated[
        Path | None,
        typer.Option(
            help="Recorded traffic instead of --prompts: the folder of --traffic-dir of the "
            "orchestrators."
        ),
    ] = None
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Orchestrator that continues the prompts. Default: the target, loaded here.",
            rich_help_panel=CONNECTION,
        ),
    ] = None
    loss: Annotated[
        str,
        typer.Option(help="kl, reverse-kl, tv, lk-alpha or lk-lambda.", rich_help_panel=_TRAINING),
    ] = "kl"
    minutes: Annotated[
        float,
        typer.Option(
            help="Time limit: a quarter for continuing prompts, the rest for training. Loading and "
            "measuring come on top.",
            rich_help_panel=_TRAINING,
        ),
    ] = 20.0
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training steps. Default: until each row was used 16 times.",
            rich_help_panel=_TRAINING,
        ),
    ] = None
    samples: Annotated[
        int, typer.Option(min=1, help="Continuations to train on.", rich_help_panel=_TRAINING)
    ] = 2048
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per continuation.", rich_help_panel=_TRAINING)
    ] = 128
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Longer prompts keep their last tokens.", rich_help_panel=_TRAINING
        ),
    ] = 384
    temperatures: Annotated[
        str,
        typer.Option(
            help="Sampling temperatures of the continuations; 0 is greedy.",
            rich_help_panel=_TRAINING,
        ),
    ] = "0,0.7,1"
    batch: Annotated[
        int,
        typer.Option(min=1, help="Rows per step and process.", rich_help_panel=_TRAINING),
    ] = 16
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Of AdamW, for embeddings and norms; Muon trains the layers' matrices at 4 times "
            "this rate.",
            rich_help_panel=_TRAINING,
        ),
    ] = 5e-4
    cache_mb: Annotated[
        int,
        typer.Option(
            min=0,
            help="Memory per process for the target's probabilities, 384 bytes per position; "
            "those of other rows are computed at each use.",
            rich_help_panel=_TRAINING,
        ),
    ] = 2048
    checkpoint_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds between checkpoints.", rich_help_panel=_TRAINING),
    ] = 60.0
    device: Annotated[
        str, typer.Option(help="auto or cpu. auto: CUDA if present.", rich_help_panel=_TRAINING)
    ] = "auto"
    seed: Annotated[
        int, typer.Option(min=0, help="Of samples and batches.", rich_help_panel=_TRAINING)
    ] = 0
    json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False


@takes(DistillOptions)
def distill(options: DistillOptions) -> None:
    """Train a draft on its target's own text, so that more of its tokens are accepted.

    Measures the acceptance rate on held-out prompts before and after, and writes no draft that got
    worse (exit status 1). A run that was interrupted or killed goes on with the same command.
    """
    require_engine()
    from outrider_bench.distill.run import distill as run  # imports torch

    settings = _settings(options)
    report = run(settings, show=lambda line: typer.echo(line, err=options.json))
    if report is None:
        raise Signalled(signal.SIGINT)
    if options.json and report.is_main:
        typer.echo(json.dumps(report.to_dict()))
    if report.is_cut:
        raise Signalled(signal.SIGINT)
    if report.refused is not None:
        raise typer.Exit(1)


def _settings(options: DistillOptions) -> DistillSettings:
    from outrider_bench.distill.settings import DistillSettings

    given = {field.name: getattr(options, field.name) for field in fields(DistillSettings)
             if field.name not in ("access", "temperatures")}  # fmt: skip
    temperatures = parse_list(options.temperatures, "--temperatures", float)
    access = None if options.endpoint is None else options.access
    return DistillSettings(**given, temperatures=tuple(temperatures), access=access)
