"""`outrider session list | get | delete`; `send` and `show` for other short commands."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.access import AccessOptions
from outrider.cli.options import takes
from outrider.cli.request import DEFAULT_ENDPOINT, EndpointOption, endpoints_of

if TYPE_CHECKING:
    from outrider.client import AsyncClient

sessions = typer.Typer(help="List, show or delete your sessions.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, kw_only=True)
class EndpointOptions(AccessOptions):
    """Options of every command that sends short requests to an orchestrator."""

    endpoint: EndpointOption = DEFAULT_ENDPOINT


@dataclass(frozen=True, kw_only=True)
class JsonOptions(EndpointOptions):
    """Options of a command that prints a message as a table or as JSON."""

    json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class DeleteOptions(EndpointOptions):
    name: Annotated[str, typer.Argument(help="Name of the session.")]


@dataclass(frozen=True, kw_only=True)
class GetOptions(JsonOptions):
    name: Annotated[str, typer.Argument(help="Name of the session.")]


@sessions.command("list")
@takes(JsonOptions)
def list_sessions(options: JsonOptions) -> None:
    """List your sessions, sorted by name.

    Running generations that were given no session are listed under temporary names.
    """
    from rich.console import Console
    from rich.table import Table

    listed = send(options, lambda client: client.list_sessions())
    if listed.num_unreadable:
        typer.echo(
            f"warning: {listed.num_unreadable} sessions not shown: their records in Redis cannot "
            "be read; the orchestrator's log names the first of them (unreadable_sessions)",
            err=True,
        )
    if options.json:
        for session in listed.sessions:
            typer.echo(json.dumps(asdict(session), ensure_ascii=False))
        return
    table = Table(show_edge=False)
    for name in ("session", "tokens", "turns", "in use", "expires in"):
        table.add_column(name, justify="left" if name == "session" else "right", overflow="fold")
    for session in listed.sessions:
        table.add_row(
            session.session_id, str(session.num_tokens), str(session.num_turns),
            "yes" if session.in_use else "", f"{session.expires_in_s:.0f} s",
        )  # fmt: skip
    Console().print(table if listed.sessions else "no sessions")


@sessions.command()
@takes(GetOptions)
def get(options: GetOptions) -> None:
    """Show a session: its tokens, its draft statistics, the replicas that cache its KV."""
    session = send(options, lambda client: client.get_session(options.name))
    show(session, as_json=options.json)


@sessions.command()
@takes(DeleteOptions)
def delete(options: DeleteOptions) -> None:
    """Delete a session, and free its KV cache on both tiers."""
    send(options, lambda client: client.delete_session(options.name))


def send(options: EndpointOptions, request: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    """Connects to an orchestrator, awaits `request` and returns its result."""
    from outrider.cli.running import run
    from outrider.client import AsyncClient

    endpoints = endpoints_of(options.endpoint)

    async def body() -> Any:
        async with AsyncClient(endpoints, access=options.access) as client:
            return await request(client)

    return run(body())


def show(found: Any, *, as_json: bool) -> None:
    """Prints a dataclass, as a table or as one line of JSON."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(asdict(found)):
        table.add_row(Text(name, "dim"), Text(value))
    Console().print(table)


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            rows += _rows(value, f"{label} ")
        elif isinstance(value, list):
            shown = ", ".join(map(str, value[-16:]))
            rows.append((label, f"{len(value)}: … {shown}" if len(value) > 16 else shown))
        else:
            rows.append((label, "none" if value is None else str(value)))
    return rows
