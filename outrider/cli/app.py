"""The table of commands. Knows what each is called, not what it does."""

from __future__ import annotations

import typer

from outrider.cli.bench import bench
from outrider.cli.chaos import chaos
from outrider.cli.demo import demo
from outrider.cli.generate import generate
from outrider.cli.keys import keys
from outrider.cli.quickstart import quickstart
from outrider.cli.sessions import model, sessions
from outrider.cli.tokenizer import convert_tokenizer
from outrider.cli.top import top
from outrider.cli.up import up

app = typer.Typer(
    name="outrider",
    help="Distributed speculative decoding for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(up)
app.command()(generate)
app.command()(demo)
app.command()(model)
app.command()(top)
app.command()(chaos)
app.command()(convert_tokenizer)
app.add_typer(sessions, name="session")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
app.add_typer(quickstart, name="quickstart")
