"""Documents name files that exist, and links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_links_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    paths = {*NAMED.findall(text), *OPERATED.findall(text)}
    named = {path for path in paths if not (ROOT / path).exists()}
    linked = {path for path in LINK.findall(text) if not (page.parent / path).exists()}
    assert named == set(), f"{page.name} names files that are not there"
    assert linked == set(), f"{page.name} links to files that are not there"


def test_the_way_of_a_request_is_short() -> None:
    """At most 15 steps, each naming a file (that it exists is checked above)."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    way = text.partition("## The way of a request")[2].partition("\n## ")[0]
    steps = re.split(r"^\d+\. ", way, flags=re.MULTILINE)[1:]
    assert 8 <= len(steps) <= 15
    assert sum(".py`" in step for step in steps) >= len(steps) - 1


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
