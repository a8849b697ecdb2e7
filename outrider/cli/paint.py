"""Streamed text: on a terminal each token in the colour of where it came from, else as it is.

Knows the wire's chunks, and nothing of calls.
"""

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
# A model may write anything; its escape sequences are shown, not obeyed.
_SHOWN = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN |= {0x7F: "␡"} | {code: "�" for code in range(0x80, 0xA0)}


class PlainWriter:
    """Writes the text alone, for pipes and files."""

    def show(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Nothing: the text is all there is."""


class ColourWriter:
    """Writes chunks as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._ends_line = True

    def show(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        for text, origin in pieces(chunk):
            style = Style.parse(_STYLES.get(origin, "default"))
            # As a segment, it is written as it is: no wrapping, tabs are the terminal's.
            segments = Segments([Segment(text.translate(_SHOWN), style)])
            self._console.print(segments, soft_wrap=True, end="")
            self._ends_line = text.endswith("\n")

    def end_line(self) -> None:
        """What comes next begins on a line of its own."""
        if not self._ends_line:
            self._console.out("")
            self._ends_line = True


def legend() -> Text:
    """What the colours mean."""
    words = Text()
    for origin, name in ORIGIN_NAMES.items():
        words.append("■ ", _STYLES[origin]).append(f"{name}   ", "dim")
    return words


def pieces(chunk: orchestrator_pb2.GenerateResponse) -> Iterator[tuple[str, int]]:
    """The chunk's text by token, with the token's origin; together they are all of the text."""
    start = 0
    for origin, end in zip(chunk.origins, chunk.text_ends, strict=False):
        if end > start:
            yield chunk.text[start:end], origin
            start = end
    if start < len(chunk.text):
        last = chunk.origins[-1] if chunk.origins else orchestrator_pb2.TOKEN_ORIGIN_UNSPECIFIED
        yield chunk.text[start:], last
