"""Commands about models: `outrider model` and `outrider convert-tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.options import takes
from outrider.cli.sessions import JsonOptions, send, show
from outrider.errors import ConfigError


@takes(JsonOptions)
def model(options: JsonOptions) -> None:
    """Show the models that the orchestrator serves."""
    show(send(options, lambda client: client.models()), as_json=options.json)


def convert_tokenizer(
    model: Annotated[
        str, typer.Argument(help="Local directory or Hub name of a model without tokenizer.json.")
    ],
    directory: Annotated[
        Path, typer.Argument(help="Output directory, for the orchestrator's --tokenizer.")
    ],
) -> None:
    """Convert a SentencePiece or vocab.json tokenizer to a tokenizer.json.

    Needs transformers, which is not installed with an orchestrator alone.
    """
    from outrider.tokenizer_files import TokenizerFiles

    files = TokenizerFiles(model).convert()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(content, "utf-8")
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}") from error
    typer.echo(f"{directory}: {', '.join(files)}")
