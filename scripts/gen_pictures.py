"""Draws the pictures of docs/concepts: `python scripts/gen_pictures.py` writes docs/images/*.svg.

Plain SVG with a background of its own, so that it is readable on light and dark pages, and dark
colours where the system asks for them. A test compares the committed files with this script.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent.parent / "docs/images"
WIDTH = 760
_STYLE = """
  text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .small { font-size: 11.5px } .quiet { fill: #59636e } .strong { font-weight: 600 }
  .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace }
  .back { fill: #ffffff; stroke: #d1d9e0 } .box { fill: #f6f8fa; stroke: #818b98 }
  .target { fill: #dbeafe; stroke: #2563a8 } .draft { fill: #fdebd3; stroke: #b3661a }
  .good { fill: #d8f3dc; stroke: #2b7a3d } .new { fill: #fde2e1; stroke: #b53a34 }
  .extra { fill: #e4dffa; stroke: #6650a4 }
  .dropped { fill: none; stroke: #818b98; stroke-dasharray: 4 3 }
  .line { stroke: #59636e; fill: none } .head { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #a5b0bb }
    .back { fill: #161b22; stroke: #3d444d } .box { fill: #21262d; stroke: #8b949e }
    .target { fill: #16365c; stroke: #6cb0f5 } .draft { fill: #4d3213; stroke: #e5a663 }
    .good { fill: #173f22; stroke: #63c174 } .new { fill: #56211f; stroke: #f08a84 }
    .extra { fill: #332a5c; stroke: #ab9df2 }
    .dropped { stroke: #8b949e } .line { stroke: #a5b0bb } .head { fill: #a5b0bb }
  }
"""


class Picture:
    """An SVG under construction. Coordinates are pixels from the top left corner."""

    def __init__(self, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
            f' width="{WIDTH}" height="{height}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
            ' markerHeight="8" orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker>',
        ]
        self.box(0.5, 0.5, WIDTH - 1, height - 1, "back", radius=8)

    def box(
        self, x: float, y: float, width: float, height: float, kind: str,
        text: str = "", *, radius: int = 4, style: str = "",
    ) -> None:  # fmt: skip
        """A rectangle with a text in its middle."""
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            f' rx="{radius}"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 4.5, text, style, anchor="middle")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Text whose baseline is at y; lines are separated by newlines."""
        kind = f' class="{style}"' if style else ""
        for number, line in enumerate(text.split("\n")):
            self._parts.append(
                f'<text x="{x:g}" y="{y + 16 * number:g}" text-anchor="{anchor}"{kind}>'
                f"{escape(line)}</text>"
            )

    def note(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Small grey text."""
        self.text(x, y, text, "small quiet", anchor)

    def line(self, *points: tuple[float, float], arrow: bool = True, dashed: bool = False) -> None:
        """A line through the points, with an arrow at its end."""
        path = " ".join(f"{x:g} {y:g}" for x, y in points)
        marks = ' marker-end="url(#head)"' if arrow else ""
        marks += ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<path class="line" d="M{path}"{marks}/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def drafting_ahead() -> str:
    """Two timelines: draft and target in turn, and the draft ahead."""
    picture = Picture(312, "Drafting in turn and drafting ahead, over time")
    unit, left = 30, 130

    def lane(y: int, name: str, blocks: list[tuple[float, float, str, str]]) -> None:
        picture.text(20, y + 19, name)
        for start, length, kind, text in blocks:
            picture.box(left + unit * start, y, unit * length - 2, 28, kind, text, style="small")

    picture.text(20, 28, "In turn: each waits for the other", "strong")
    lane(40, "draft", [(0, 3, "draft", "draft 1"), (8, 3, "draft", "draft 2"),
                       (16, 3, "draft", "draft 3")])  # fmt: skip
    lane(76, "target", [(3, 5, "target", "verify 1"), (11, 5, "target", "verify 2")])
    picture.text(20, 142, "Ahead: the draft continues for the expected outcomes", "strong")
    lane(154, "draft", [(0, 3, "draft", "draft 1"), (3, 3, "draft", "draft 2"),
                        (6, 2, "dropped", "branch"), (8, 3, "draft", "draft 3"),
                        (11, 2, "draft", "branch")])  # fmt: skip
    lane(190, "target", [(3, 5, "target", "verify 1"), (8, 5, "target", "verify 2"),
                         (13, 5, "target", "verify 3")])  # fmt: skip
    for at in (8, 13):
        picture.line((left + unit * at - 1, 222), (left + unit * at - 1, 236), arrow=False)
    picture.note(left + unit * 8 + 3, 252, "result 1 is the expected\none: draft 2 is sent", "end")
    picture.note(
        left + unit * 13 - 4,
        252,
        "result 2 is another one, for which\nthere is a branch: it is sent",
    )
    picture.line((left, 296), (left + unit * 20, 296))
    picture.note(20, 300, "time")
    picture.box(20, 252, 22, 14, "dropped")
    picture.note(48, 264, "not used")
    return picture.svg()


def exactness() -> str:
    """Two rounds of γ = 4: one with a rejection, one in which all draft tokens are accepted."""
    picture = Picture(326, "Accepted, rejected, recovered and bonus tokens of two rounds")
    step, left, high = 74, 216, 28

    def row(y: int, name: str, tokens: list[tuple[str, str]]) -> None:
        picture.text(20, y + 19, name)
        for place, (kind, text) in enumerate(tokens):
            if kind:
                picture.box(left + step * place, y, step - 8, high, kind, text, style="mono")

    picture.text(20, 28, "A draft token is rejected", "strong")
    row(40, "draft proposes", [("draft", t) for t in ("a", "+", "c", ")")])
    row(78, "target, one forward pass", [("good", "yes"), ("good", "yes"), ("new", "no"),
                                        ("dropped", "–")])  # fmt: skip
    row(116, "output of the round", [("good", "a"), ("good", "+"), ("new", "b")])
    picture.note(left + step * 5, 59, "γ = 4 draft tokens")
    picture.note(left + step * 5, 97, "accept or reject, in order;\nnothing after a rejection")
    picture.note(left + step * 5, 139, "2 accepted, 1 recovered")
    picture.text(20, 186, "All draft tokens are accepted", "strong")
    row(198, "draft proposes", [("draft", t) for t in (")", ":", "↵", "return")])
    row(236, "target, one forward pass", [("good", "yes")] * 4 + [("extra", "next")])
    accepted = [("good", token) for token in (")", ":", "↵", "return")]
    row(274, "output of the round", [*accepted, ("extra", "a")])
    picture.note(left + step * 5, 297, "4 accepted, 1 bonus")
    picture.note(left + step * 5, 255, "the pass also has the\nnext token's distribution")
    return picture.svg()


def kv_cache() -> str:
    """Pages of two sequences that share a beginning; roll-back inside a page."""
    picture = Picture(336, "Pages of the KV cache: sharing, forks and roll-back")
    wide, high, left = 106, 30, 166

    def pages(y: int, name: str, kinds: list[tuple[int, str, str]]) -> None:
        picture.text(20, y + 20, name)
        for place, kind, text in kinds:
            picture.box(left + (wide + 10) * place, y, wide, high, kind, text, style="small")

    picture.text(20, 28, "A fork shares full pages", "strong")
    pages(42, "sequence", [(0, "target", "page 1: 16"), (1, "target", "page 2: 16"),
                           (2, "target", "page 3: 5")])  # fmt: skip
    pages(104, "fork (a branch)", [(2, "draft", "page 4: copy of 3"), (3, "draft", "page 5")])
    for place in (0, 1):
        x = left + (wide + 10) * place + wide / 2
        picture.line((x, 119), (x, 74))
    picture.line((left + wide / 2, 119), (left + (wide + 10) * 2 - 4, 119), arrow=False)
    picture.note(left + (wide + 10) * 4, 57, "full pages: one copy,\ncounted owners")
    picture.note(left + (wide + 10) * 4, 117, "partly filled page:\ncopied")
    picture.text(20, 176, "A rejection rolls back by length", "strong")
    token = 25
    for place in range(16):
        kind = "target" if place < 9 else "dropped" if place < 13 else "box"
        picture.box(left + token * place, 190, token - 3, high, kind, radius=2)
    picture.text(20, 210, "a page of 16 tokens")
    picture.line((left + token * 9 - 1.5, 232), (left + token * 9 - 1.5, 222))
    picture.note(left + token * 9, 246, "keep_len: later tokens are overwritten", "middle")
    picture.text(20, 278, "Another prompt finds full pages", "strong")
    found = [(0, "good", "page 1, cached"), (1, "good", "page 2, cached")]
    pages(288, "same first 32 tokens", [*found, (2, "box", "computed")])
    return picture.svg()


def failures() -> str:
    """What each program holds, and what its loss costs."""
    picture = Picture(302, "What each program holds, and what happens when it is lost")
    boxes = {
        "client": (24, 52, 130, "box", "client"),
        "orchestrator": (250, 52, 200, "box", "orchestrator"),
        "redis": (562, 52, 174, "good", "Redis"),
        "draft": (146, 196, 190, "draft", "draft service"),
        "target": (426, 196, 190, "target", "target service"),
    }
    for x, y, width, kind, name in boxes.values():
        picture.box(x, y, width, 34, kind, name, style="strong")
    picture.line((154, 69), (248, 69))
    picture.line((450, 69), (560, 69))
    picture.line((268, 86), (240, 194))
    picture.line((432, 86), (500, 194))
    picture.text(
        24,
        28,
        "The context is in the orchestrator and in Redis; KV caches are computed from it",
        "strong",
    )
    picture.note(24, 106, "has: the tokens it received\nlost: generation cancelled")
    picture.note(
        562,
        106,
        "has: tokens, sessions, leases\nlost: running generations\ncontinue, new ones fail",
    )
    picture.note(350, 106, "has: the context\nlost: client resumes\non another one", "middle")
    picture.note(
        146,
        250,
        "has: KV cache (a copy)\nlost: plain decoding until\na replica is there; same output",
    )
    picture.note(
        426,
        250,
        "has: KV cache (a copy)\n"
        "lost: another replica gets the whole\n"
        "context; no token lost or repeated",
    )
    return picture.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "drafting-ahead": drafting_ahead,
    "exactness": exactness,
    "kv-cache": kv_cache,
    "failures": failures,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(), "utf-8")
