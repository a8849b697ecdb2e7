"""Writers of streamed text: coloured by token origin on a terminal, plain elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from outrider.v1 import orchestrator_pb2

ORIGIN_NAMES: dict[int, str] = {
    orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED: "accepted",
    orchestrator_pb2.TOKEN_ORIGIN_RECOVERED: "recovered",
    orchestrator_pb2.TOKEN_ORIGIN_BONUS: "bonus",
    orchestrator_pb2.TOKEN_ORIGIN_PLAIN: "plain",
}
_STYLES: dict[int, str] = {
    orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED: "green",
    orchestrator_pb2.TOKEN_ORIGIN_RECOVERED: "bold yellow",
    orchestrator_pb2.TOKEN_ORIGIN_BONUS: "bold cyan",
    orchestrator_pb2.TOKEN_ORIGIN_PLAIN: "default",
}
# Control characters of a model's output are made visible: the terminal must not obey them.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: "␡"} | {code: "�" for code in range(0x80, 0xA0)}


class PlainWriter:
    """Writes the text alone to standard output, for pipes and files."""

    def show(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Does nothing: the output is the text alone."""


class ColourWriter:
    """Writes each token in the colour of its origin."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ends_line = True

    def show(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        for text, origin in pieces(chunk):
            style = Style.parse(_STYLES.get(origin, "default"))
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
    for origin, name in ORIGIN_NAMES.items():
        legend.append("■ ", _STYLES[origin]).append(f"{name}   ", "dim")
    return legend


def pieces(chunk: orchestrator_pb2.GenerateResponse) -> Iterator[tuple[str, int]]:
    """Splits the chunk's text by token; yields (text, token origin)."""
    start = 0
    for origin, end in zip(chunk.origins, chunk.text_ends, strict=False):
        if end > start:
            yield chunk.text[start:end], origin
            start = end
    if start < len(chunk.text):
        last = chunk.origins[-1] if chunk.origins else orchestrator_pb2.TOKEN_ORIGIN_UNSPECIFIED
        yield chunk.text[start:], last
