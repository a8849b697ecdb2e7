"""`outrider session get | delete` and `outrider model`: what the orchestrator knows."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.request import DEFAULT_ENDPOINT, EndpointOption

if TYPE_CHECKING:
    from outrider.cli.client import Client

sessions = typer.Typer(help="Look at or delete a session.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@sessions.command()
def get(name: str, json: JsonOption = False, endpoint: EndpointOption = DEFAULT_ENDPOINT) -> None:
    """Show a session: its tokens, its drafts, where its keys and values lie."""
    session = _ask(endpoint, lambda client: client.get_session(name))
    _show(session, as_json=json)


@sessions.command()
def delete(name: str, endpoint: EndpointOption = DEFAULT_ENDPOINT) -> None:
    """Delete a session and free what both tiers keep of it."""
    _ask(endpoint, lambda client: client.delete_session(name))


def model(json: JsonOption = False, endpoint: EndpointOption = DEFAULT_ENDPOINT) -> None:
    """Show which models are served."""
    _show(_ask(endpoint, lambda client: client.model_info()), as_json=json)


def _ask(endpoint: str, question: Callable[[Client], Awaitable[Any]]) -> Any:
    from outrider.cli.client import connected
    from outrider.cli.running import run

    async def body() -> Any:
        async with connected(endpoint) as client:
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
