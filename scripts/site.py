"""Hooks of the documentation site, run by mkdocs.

The navigation is the index of docs/README.md. Documents link to source files as GitHub shows them;
a site has none, so such a link points to the repository if `repo_url` is set, and is plain text
otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pathspec.gitignore import GitIgnoreSpec

DOCS = Path(__file__).parent.parent / "docs"
DECISIONS = "adr/index.md"
_SECTION = re.compile(r"^\*\*(.+?)\*\*")
_ENTRY = re.compile(r"^\| \[(.+?)\]\((.+?)\)")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Takes the navigation from docs/README.md."""
    sections: list[Any] = [{"Outrider": "README.md"}]
    for line in (DOCS / "README.md").read_text("utf-8").splitlines():
        if found := _SECTION.match(line):
            sections.append({found[1]: []})
        elif found := _ENTRY.match(line):
            (pages,) = sections[-1].values()
            pages.append({found[1]: DECISIONS if found[2] == "adr" else found[2]})
    config.nav = sections
    # Single decisions are reached from their list.
    config.not_in_nav = GitIgnoreSpec.from_lines(["/adr/0*.md"])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the list of decisions."""
    lines = ["# Decisions", "", "What was chosen, why, and what else there was.", ""]
    for path in sorted((DOCS / "adr").glob("*.md")):
        title = path.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    files.append(File.generated(config, DECISIONS, content="\n".join(lines)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to what is not part of the site."""
    folder = (DOCS / page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        text, path, anchor = found[1], found[2], found[3] or ""
        linked = (folder / path).resolve()
        if linked == DOCS / "adr":
            return f"[{text}]({DECISIONS})"
        if DOCS in linked.parents and linked.suffix == ".md":
            return found[0]
        source = linked.relative_to(DOCS.parent).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{source}{anchor})"
        return text if source in text else f"{text} (`{source}`)"

    return _LINK.sub(replaced, markdown)
