"""Writers of streamed text: coloured by token origin on a terminal, plain elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from outrider.client import Chunk

_STYLES: dict[str, str] = {
    "accepted": "green",
    "recovered": "bold yellow",
    "bonus": "bold cyan",
    "plain": "default",
}
# Control characters of a model's output are made visible: the terminal must not obey them.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: "␡"} | {code: "�" for code in range(0x80, 0xA0)}


class PlainWriter:
    """Writes the text alone to standard output, for pipes and files."""

    def show(self, chunk: Chunk) -> None:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Does nothing: the output is the text alone."""


class ColourWriter:
    """Writes each token in the colour of its origin."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ends_line = True

    def show(self, chunk: Chunk) -> None:
        for text, origin in chunk.pieces():
            style = Style.parse(_STYLES[origin])
            # A segment is written unchanged: rich neither wraps it nor expands tabs.
            segments = Segments([Segment(text.translate(_VISIBLE), style)])
            self._console.print(segments, soft_wrap=True, end="")
            self._ends_line = text.endswith("\n")

    def end_line(self) -> None:
        """Starts a new line, unless the text ended with one."""
        if not self._ends_line:
            self._console.out("")
            self._ends_line = True


def legend() -> Text:
    """The meaning of the colours."""
    legend = Text()
    for origin, style in _STYLES.items():
        legend.append("■ ", style).append(f"{origin}   ", "dim")
    return legend
