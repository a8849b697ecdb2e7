"""`outrider top`: what the programs do right now, from their `/metrics`. Changes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.telemetry.scraping import Change, Scrape


_PLAIN_WIDTH = 160


@dataclass(frozen=True)
class TopOptions:
    addresses: Annotated[
        list[str],
        typer.Argument(
            metavar="HOST:PORT...",
            help="The metrics_port of each program to watch; `outrider up --metrics` prints them.",
        ),
    ]
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0
    window: Annotated[
        float, typer.Option(help="Rates and quantiles are of the last so many seconds.")
    ] = 10.0
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False


@takes(TopOptions)
def top(options: TopOptions) -> None:
    """Watch orchestrators and replicas: requests, sessions, acceptance, latency."""
    from rich.console import Console

    from outrider.cli.running import run
    from outrider.settings.fields import require_address

    for address in options.addresses:
        require_address(address, "HOST:PORT")
    if not options.interval > 0:
        raise ConfigError("--interval: must be more than 0")
    if options.window < options.interval:
        raise ConfigError("--window: must be --interval or more")
    console = Console()
    # Where nobody's window is to be fitted, nothing is cut off.
    run(_top(options, console if console.is_terminal else Console(width=_PLAIN_WIDTH)))


class Watched:
    """One program: its scrapes of the last `window_s`, or why there is none."""

    def __init__(self, address: str, window_s: float) -> None:
        self.address = address
        self.trouble = ""
        self._window_s = window_s
        self._scrapes: list[Scrape] = []

    async def look(self) -> None:
        """Within the scrape's own time-out."""
        from outrider.telemetry.scraping import Scrape

        try:
            self._scrapes.append(await asyncio.to_thread(Scrape.of, self.address))
            self.trouble = ""
        except Unavailable as error:
            self._scrapes, self.trouble = [], str(error)
            return
        oldest = self._scrapes[-1].taken_at - self._window_s
        while len(self._scrapes) > 2 and self._scrapes[1].taken_at <= oldest:
            self._scrapes.pop(0)

    @property
    def change(self) -> Change | None:
        """None while it does not answer. At first it is of the program's whole life."""
        from outrider.telemetry.scraping import Change

        if not self._scrapes:
            return None
        if len(self._scrapes) == 1:
            return Change.since_start(self._scrapes[0])
        return Change(self._scrapes[0], self._scrapes[-1])


async def _top(options: TopOptions, console: Console) -> None:
    from rich.live import Live

    from outrider.cli.top_view import view

    watched = [Watched(address, options.window) for address in options.addresses]

    async def look() -> None:
        async with asyncio.TaskGroup() as tasks:
            for program in watched:
                tasks.create_task(program.look())

    await look()
    if options.once:
        console.print(view(watched))
        if all(program.trouble for program in watched):
            raise Unavailable("; ".join(program.trouble for program in watched))
        return
    with Live(view(watched), console=console, screen=console.is_terminal) as live:
        while True:
            await asyncio.sleep(options.interval)
            await look()
            live.update(view(watched))
