"""`outrider generate`: one generation, streamed to a terminal or a pipe, or printed as JSON."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import typer

from outrider.cli.options import takes
from outrider.cli.request import GenerateOptions, build_request, endpoints_of
from outrider.errors import CallFailed

if TYPE_CHECKING:
    from outrider.cli.paint import ColourWriter, PlainWriter
    from outrider.client import Generation, ResumeFailed
    from outrider.client.resume import Report


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Continue a prompt; print the text, then speed and acceptance rate.

    On a terminal, colours show which tokens the draft proposed. The text goes to standard output,
    the summary to standard error.
    """
    from outrider.cli.result import to_dict
    from outrider.cli.running import run

    output = run(_generate(options))
    if options.json:
        typer.echo(json.dumps(to_dict(output), ensure_ascii=False))
    else:
        if options.token_ids is not None and not output.text:  # the model has no tokenizer
            typer.echo(",".join(map(str, output.token_ids)))
        print_summary(output)
    if output.finish_reason == "cancelled":
        raise CallFailed("CANCELLED: the server is stopping; the output is incomplete")


async def _generate(options: GenerateOptions) -> Generation:
    """Runs the generation; over several orchestrators if one of them fails."""
    from outrider.client import AsyncClient, ResumeFailed

    request, endpoints = build_request(options), endpoints_of(options.endpoint)
    writer = None if options.json else _writer()
    resume_for_s = options.resume_for if len(endpoints) > 1 else 0.0
    try:
        async with AsyncClient(
            endpoints, access=options.access, resume_for_s=resume_for_s, report=_reporter(writer)
        ) as client:
            stream = client.stream(request, timeout_s=options.timeout)
            async for chunk in stream:
                if writer is not None:
                    writer.show(chunk)
            return await stream.result()
    except ResumeFailed as error:
        raise CallFailed(f"{error}. {_next_command(options, error)}") from error
    finally:
        if writer is not None:
            writer.end_line()


def _next_command(options: GenerateOptions, error: ResumeFailed) -> str:
    """The command that resumes the generation; if that is impossible, one that shows the session.

    It continues after text that was already printed. JSON and token ids are printed from the start.
    """
    access = [
        f"--{name.replace('_', '-')}={value}"
        for name in ("tls_ca", "tls_cert", "tls_key", "api_key_file")
        if (value := getattr(options, name))
    ]
    if not error.can_resume:
        endpoint = f"--endpoint={endpoints_of(options.endpoint)[0]}"
        command = ["outrider", "session", "get", error.session_id, endpoint, *access]
        return f"Show the recorded tokens with: {shlex.join(command)}"
    num_printed = 0 if options.json or options.token_ids is not None else error.num_received
    command = ["outrider", "generate", f"--endpoint={options.endpoint}"]
    command += [f"--session={error.session_id}", f"--resume-from={num_printed}", *access]
    return f"Resume with: {shlex.join([*command, *(['--json'] if options.json else [])])}"


def _writer() -> ColourWriter | PlainWriter:
    from rich.console import Console

    from outrider.cli.paint import ColourWriter, PlainWriter

    console = Console()
    return ColourWriter(console) if console.is_terminal else PlainWriter()


def _reporter(writer: ColourWriter | PlainWriter | None) -> Report:
    """Prints messages to standard error; on a terminal each starts a new line."""

    def report(message: str) -> None:
        if writer is not None:
            writer.end_line()
        print(f"outrider: {message}", file=sys.stderr, flush=True)

    return report


def print_summary(output: Generation) -> None:
    """Prints the summary to standard error: standard output may be a file."""
    from rich.console import Console
    from rich.markup import escape

    from outrider.cli.paint import legend
    from outrider.cli.result import summary

    console = Console(stderr=True, highlight=False)
    console.print()
    if console.is_terminal:
        console.print(legend())
    for name, value in summary(output):
        console.print(f"[dim]{name:<8}[/]{escape(value)}", soft_wrap=True)
