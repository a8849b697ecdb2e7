"""`outrider convert-tokenizer`: a tokenizer as programs without transformers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.errors import ConfigError


def convert_tokenizer(
    model: Annotated[
        str,
        typer.Argument(help="Directory or hub name of a model without tokenizer.json."),
    ],
    directory: Annotated[
        Path, typer.Argument(help="Where the files go; the orchestrator's --tokenizer.")
    ],
) -> None:
    """Write a tokenizer.json, and what belongs to it, of a SentencePiece or vocab.json model.

    Needs transformers, which the orchestrator's own installation leaves out.
    """
    from outrider.tokenizer_files import TokenizerFiles

    files = TokenizerFiles(model)
    written = files.convert()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in written.items():
            (directory / name).write_text(content, "utf-8")
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror or error}") from error
    typer.echo(f"{directory}: {', '.join(written)}")
