"""View of a system's start and end: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from outrider.cli.supervisor import Event, State

_NOTES = {"orchestrator": "waiting for the models"}
_MARKS = {
    State.WAITING: Text("·", "dim"),
    State.READY: Text("✔", "green"),
    State.FAILED: Text("✘", "bold red"),
    State.STOPPING: Text("·", "dim"),
    State.STOPPED: Text("·", "dim"),
}


class StackView:
    """Context manager: live while programs start. `report` may be called before and after."""

    def __init__(
        self,
        console: Console,
        *,
        models: dict[str, str] | None = None,
        stays: bool = True,
        shows_end: bool = False,
    ) -> None:
        """`models`: description to show beside a program's name.

        `stays`: leave the table on the screen once all programs run. `shows_end`: show stopped
        programs too.
        """
        self.console = console
        self._models = models or {}
        self._stays = stays
        self._shows_end = shows_end
        self._events: dict[str, Event] = {}
        self._since: dict[str, float] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None

    def __enter__(self) -> StackView:
        if self.console.is_terminal:
            self._live = Live(
                console=self.console,
                get_renderable=self._table,
                refresh_per_second=10,
                transient=not self._stays,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def report(self, event: Event) -> None:
        """Takes an event of the supervisor."""
        if event.state is State.LOADING:
            self._since[event.name] = time.monotonic()
        self._events[event.name] = event
        if self._live is None and (event.state is not State.STOPPED or self._shows_end):
            self._print(event)

    def _print(self, event: Event) -> None:
        if event.state in (State.LOADING, State.READY, State.STOPPED):
            self.console.print(f"{event.name}: {_description(event)}", style="dim", highlight=False)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, event in self._events.items():
            mark = self._spinner if event.state is State.LOADING else _MARKS[event.state]
            seconds = time.monotonic() - self._since.get(name, time.monotonic())
            text = (
                f"loading, {seconds:.0f} s" if event.state is State.LOADING else _description(event)
            )
            style = "dim" if event.state is State.WAITING else ""
            model = Text(self._models.get(name, ""), "dim", no_wrap=True, overflow="ellipsis")
            table.add_row(mark, Text(name, "bold"), Text(text, style), model)
        return table


def _description(event: Event) -> str:
    if event.state is State.READY:
        return f"ready in {event.after_s:.1f} s"
    if event.state is State.WAITING:
        return _NOTES.get(event.name, "waiting")
    return str(event.state.value)
