"""Documents name files, functions and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.sources import script

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
# A path in backticks: with a folder of this repository before it.
NAMED = re.compile(
    r"`((?:outrider|outrider_bench|orchestrator|draft_service|target_service|tests|scripts|deploy|docs)"
    r"/[\w./-]*[\w/])`"
)
# A path in a command or a sentence, with or without backticks.
OPERATED = re.compile(r"(?<![\w/])((?:deploy|scripts)/[\w./-]+\w)")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = {*NAMED.findall(text), *OPERATED.findall(text)}
    named = {path for path in paths if not (ROOT / path).exists()}
    linked = {path for path, _ in LINK.findall(text) if not (page.parent / path).exists()}
    assert named == set(), f"{page.name} names files that do not exist"
    assert linked == set(), f"{page.name} links to files that do not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_sections_exist(page: Path) -> None:
    links = {
        (page.parent / path if path else page, anchor)
        for path, anchor in LINK.findall(page.read_text("utf-8"))
        if anchor
    }
    missing = {f"{target.name}#{anchor}" for target, anchor in links
               if anchor not in anchors(target)}  # fmt: skip
    assert missing == set()


def test_every_page_is_in_the_index() -> None:
    """docs/README.md links every page, except single decisions."""
    index = ROOT / "docs/README.md"
    linked = {(index.parent / path).resolve() for path, _ in LINK.findall(index.read_text("utf-8"))}
    pages = {page for page in PAGES if ROOT / "docs" in page.parents and page.parent.name != "adr"}
    assert {str(page) for page in pages - linked} == {str(index)}


def test_where_to_look_names_what_is_there() -> None:
    """Each row of CONTRIBUTING's table: its last column names classes or functions of its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = text.partition("## Where to look")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| Wh")]
    assert len(rows) >= 15
    for question, files, names in rows:
        sources = [(ROOT / path).read_text("utf-8") for path in re.findall(r"`([^`]+)`", files)]
        for name in re.findall(r"`(\w+)`", names):
            is_there = any(re.search(rf"^ *(class|def) {name}\b", s, re.MULTILINE) for s in sources)
            assert is_there, f"{question} {name}"


def test_how_a_request_travels_is_short() -> None:
    """At most 15 steps, each naming a file (test_paths_and_links_exist checks that it exists)."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    way = text.partition("## How a request travels")[2].partition("\n## ")[0]
    steps = re.split(r"^\d+\. ", way, flags=re.MULTILINE)[1:]
    assert 8 <= len(steps) <= 15
    assert sum(".py`" in step for step in steps) >= len(steps) - 1


def test_pictures_are_up_to_date_and_described() -> None:
    """As scripts/gen_pictures.py draws them; each is on a page, with a text for screen readers."""
    pictures = script("gen_pictures").PICTURES
    assert len(pictures) >= 4
    for name, draw in pictures.items():
        drawn = (ROOT / f"docs/images/{name}.svg").read_text("utf-8")
        assert drawn == draw(), "run scripts/gen_pictures.py"
        page = (ROOT / f"docs/concepts/{name}.md").read_text("utf-8")
        assert re.search(rf"!\[[^\]]{{80,}}\]\(\.\./images/{name}\.svg\)", page), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
