"""Code blocks of the pages, and their commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs/get-started.md", *sorted(ROOT.glob("docs/how-to/*.md")))
# sh: commands. console: commands behind `$ `, each followed by its output. Others are no commands.
SHELL = ("sh", "console")
OTHER = ("text", "json", "yaml", "js")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(^|\s+)# .*$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a page; `output` is what the page shows below it, "" for nothing."""

    page: str
    line: int
    text: str
    output: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Block:
    """A code block; `line` is the one after its opening fence."""

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> Iterator[Command]:
        """Commands in order. A Python block is one command."""
        if self.language == "python":
            yield Command(self.page, self.line, f"python - <<'END'\n{self.text}END")
        elif self.language == "sh":
            for line, text in _joined(_COMMENT.sub("", self.text)):
                yield Command(self.page, self.line + line, text)
        elif self.language == "console":
            for shown in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
                (_, text), *rest = _joined(shown)
                output = "".join(f"{line}\n" for _, line in rest)
                yield Command(self.page, self.line, text, output)


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, continued ones joined, with their numbers from 0."""
    start, parts = 0, ""
    for number, line in enumerate(text.splitlines()):
        start = start if parts else number
        if line.endswith("\\"):
            parts += line[:-1].rstrip() + " "
            continue
        if whole := (parts + (line.lstrip() if parts else line)).rstrip():
            yield start, whole
        parts = ""


def blocks(page: Path) -> list[Block]:
    """Code blocks of a page."""
    text = page.read_text("utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(name, text[: found.start()].count("\n") + 2, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]
