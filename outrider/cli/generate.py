"""`outrider generate`: one output, streamed to a person, to a pipe or as JSON."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from outrider.cli.options import takes
from outrider.cli.request import GenerateOptions, build_request, endpoints_of
from outrider.errors import CallFailed

if TYPE_CHECKING:
    from outrider.cli.paint import ColourWriter, PlainWriter
    from outrider.client.client import Output, Show
    from outrider.client.resume import ResumeFailed
    from outrider.v1.orchestrator_pb2 import GenerateRequest


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Continue a prompt, and say how speculation went.

    On a terminal, colours tell accepted draft tokens from those of the target. Elsewhere standard
    output gets the text alone, standard error the summary.
    """
    from outrider.cli.result import finish_reason, to_dict
    from outrider.cli.running import run

    output = run(_generate(options))
    if options.json:
        typer.echo(json.dumps(to_dict(output), ensure_ascii=False))
    else:
        if options.token_ids is not None and not output.text:  # a model without a tokenizer
            typer.echo(",".join(map(str, output.token_ids)))
        summarise(output)
    if finish_reason(output.result) == "cancelled":
        raise CallFailed("CANCELLED: the server is stopping; the output is incomplete")


async def _generate(options: GenerateOptions) -> Output:
    from outrider.client.client import connected

    request, endpoints = build_request(options), endpoints_of(options.endpoint)
    writer = None if options.json else _writer()
    show = writer.show if writer is not None else None
    try:
        if len(endpoints) > 1:
            return await _follow(options, request, endpoints, show, _sayer(writer))
        async with connected(endpoints[0], options.access) as client:
            return await client.generate(request, show=show, timeout_s=options.timeout)
    finally:
        if writer is not None:
            writer.end_line()


async def _follow(
    options: GenerateOptions,
    request: GenerateRequest,
    endpoints: list[str],
    show: Show | None,
    say: Callable[[str], None],
) -> Output:
    """A one-off is given a session for the time it takes: only those can be gone on with."""
    from outrider.client.client import connected
    from outrider.client.resume import ResumeFailed, ResumeLimits, StreamFollower

    is_ours = not request.session_id
    if is_ours:
        request.session_id, request.create_session = f"cli-{secrets.token_hex(8)}", True
    async with contextlib.AsyncExitStack() as stack:
        access = options.access
        clients = [await stack.enter_async_context(connected(e, access)) for e in endpoints]
        has_turns = not is_ours and options.resume_from is None
        patience = ResumeLimits(options.resume_for, options.timeout)
        follower = StreamFollower(
            clients, request, patience, has_turns=has_turns, show=show, say=say
        )
        try:
            return await follower.run()
        except ResumeFailed as error:
            is_ours = False  # it is what the output can be gone on with
            raise CallFailed(f"{error}. {_way_on(options, error)}") from error
        finally:
            if is_ours:
                await follower.forget()


def _way_on(options: GenerateOptions, error: ResumeFailed) -> str:
    """The command that writes what is missing: of text that which was not written, else all.

    Where no call can write it, the one that shows what the session has.
    """
    access = [
        f"--{name.replace('_', '-')}={value}"
        for name in ("tls_ca", "tls_cert", "tls_key", "api_key_file")
        if (value := getattr(options, name))
    ]
    if not error.can_resume:
        endpoint = f"--endpoint={endpoints_of(options.endpoint)[0]}"
        command = ["outrider", "session", "get", error.session_id, endpoint, *access]
        return f"What was recorded of it is shown by: {shlex.join(command)}"
    num_held = 0 if options.json or options.token_ids is not None else error.num_held
    command = ["outrider", "generate", f"--endpoint={options.endpoint}"]
    command += [f"--session={error.session_id}", f"--resume-from={num_held}", *access]
    return f"Go on with: {shlex.join([*command, *(['--json'] if options.json else [])])}"


def _writer() -> ColourWriter | PlainWriter:
    from rich.console import Console

    from outrider.cli.paint import ColourWriter, PlainWriter

    console = Console()
    return ColourWriter(console) if console.is_terminal else PlainWriter()


def _sayer(writer: ColourWriter | PlainWriter | None) -> Callable[[str], None]:
    """On standard error, on a line of its own where that is the same terminal."""

    def say(words: str) -> None:
        if writer is not None:
            writer.end_line()
        print(f"outrider: {words}", file=sys.stderr, flush=True)

    return say


def summarise(output: Output) -> None:
    """On standard error: standard output may be a file."""
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
