"""`outrider top`: live view of the programs' metrics, scraped from their `/metrics`."""

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


# Width of the output where it is not a terminal.
_PLAIN_WIDTH = 160


@dataclass(frozen=True)
class TopOptions:
    """Flags of `outrider top`."""

    addresses: Annotated[
        list[str],
        typer.Argument(
            metavar="HOST:PORT...",
            help="Address of each program's metrics_port; `outrider up --metrics` prints them.",
        ),
    ]
    interval: Annotated[float, typer.Option(help="Seconds between two scrapes.")] = 1.0
    window: Annotated[
        float, typer.Option(help="Seconds over which rates and quantiles are computed.")
    ] = 10.0
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False


@takes(TopOptions)
def top(options: TopOptions) -> None:
    """Watch orchestrators and replicas: requests, sessions, acceptance, latency."""
    from rich.console import Console

    from outrider.cli.running import run
    from outrider.settings.addresses import require_address

    for address in options.addresses:
        require_address(address, "HOST:PORT")
    if not options.interval > 0:
        raise ConfigError("--interval: must be more than 0")
    if options.window < options.interval:
        raise ConfigError("--window: must be --interval or more")
    console = Console()
    # A pipe or file has no width: nothing is cut off.
    run(_top(options, console if console.is_terminal else Console(width=_PLAIN_WIDTH)))


class Watched:
    """One program: its scrapes of the last `window_s` seconds, or the error of the last scrape."""

    def __init__(self, address: str, window_s: float) -> None:
        self.address = address
        self.error = ""
        self._window_s = window_s
        self._scrapes: list[Scrape] = []

    async def scrape(self) -> None:
        """Scrapes the metrics; takes at most the timeout of `Scrape.of`."""
        from outrider.telemetry.scraping import Scrape

        try:
            self._scrapes.append(await asyncio.to_thread(Scrape.of, self.address))
            self.error = ""
        except Unavailable as error:
            self._scrapes, self.error = [], str(error)
            return
        oldest = self._scrapes[-1].taken_at - self._window_s
        while len(self._scrapes) > 2 and self._scrapes[1].taken_at <= oldest:
            self._scrapes.pop(0)

    @property
    def change(self) -> Change | None:
        """Change over the window; after one scrape, since the program's start. None: no scrape."""
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

    async def scrape_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for program in watched:
                tasks.create_task(program.scrape())

    await scrape_all()
    if options.once:
        console.print(view(watched))
        if all(program.error for program in watched):
            raise Unavailable("; ".join(program.error for program in watched))
        return
    with Live(view(watched), console=console, screen=console.is_terminal) as live:
        while True:
            await asyncio.sleep(options.interval)
            await scrape_all()
            live.update(view(watched))
