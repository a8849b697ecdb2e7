"""`outrider session list | get | delete` and `outrider model`: what the orchestrator knows."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.access import AccessOptions
from outrider.cli.options import takes
from outrider.cli.request import DEFAULT_ENDPOINT, EndpointOption

if TYPE_CHECKING:
    from outrider.client.client import Client

sessions = typer.Typer(help="List, look at or delete your sessions.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@dataclass(frozen=True, kw_only=True)
class AskOptions(AccessOptions):
    """Of every command here."""

    endpoint: EndpointOption = DEFAULT_ENDPOINT


@dataclass(frozen=True, kw_only=True)
class ModelOptions(AskOptions):
    json: JsonOption = False


@dataclass(frozen=True, kw_only=True)
class DeleteOptions(AskOptions):
    name: Annotated[str, typer.Argument()]


@dataclass(frozen=True, kw_only=True)
class GetOptions(ModelOptions):
    name: Annotated[str, typer.Argument()]


@sessions.command("list")
@takes(ModelOptions)
def list_sessions(options: ModelOptions) -> None:
    """Show all your sessions, by name; those of one-off generations while they run."""
    from rich.console import Console
    from rich.table import Table

    from outrider.cli.plain import plain

    found, num_unreadable = _ask(options, lambda client: client.sessions())
    if num_unreadable:
        typer.echo(
            f"warning: {num_unreadable} not shown: Redis holds no readable session under these "
            "keys; the orchestrator's log names the first of them (unreadable_sessions)",
            err=True,
        )
    if options.json:
        for session in found:
            typer.echo(json.dumps(plain(session), ensure_ascii=False))
        return
    table = Table(show_edge=False)
    for name in ("session", "tokens", "turns", "in use", "expires in"):
        table.add_column(name, justify="left" if name == "session" else "right", overflow="fold")
    for session in found:
        table.add_row(
            session.session_id, str(session.num_tokens), str(session.num_turns),
            "yes" if session.in_use else "", f"{session.expires_in_s:.0f} s",
        )  # fmt: skip
    Console().print(table if found else "no sessions")


@sessions.command()
@takes(GetOptions)
def get(options: GetOptions) -> None:
    """Show a session: its tokens, its drafts, where its keys and values lie."""
    session = _ask(options, lambda client: client.get_session(options.name))
    _show(session, as_json=options.json)


@sessions.command()
@takes(DeleteOptions)
def delete(options: DeleteOptions) -> None:
    """Delete a session and free what both tiers keep of it."""
    _ask(options, lambda client: client.delete_session(options.name))


@takes(ModelOptions)
def model(options: ModelOptions) -> None:
    """Show which models are served."""
    _show(_ask(options, lambda client: client.model_info()), as_json=options.json)


def _ask(options: AskOptions, question: Callable[[Client], Awaitable[Any]]) -> Any:
    from outrider.cli.running import run
    from outrider.client.client import connected

    async def body() -> Any:
        async with connected(options.endpoint, options.access) as client:
            return await question(client)

    return run(body())


def _show(message: Any, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from outrider.cli.plain import plain

    if as_json:
        typer.echo(json.dumps(plain(message), ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(plain(message)):
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
