"""Each shown command is run by `make shown`, or listed with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.shown import plan
from tests.shown.blocks import OTHER, PAGES, ROOT, SHELL, Block, Command, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [command for block in BLOCKS for command in block.commands()]
# What a command that is run may begin with.
PROGRAM = re.compile(r"(outrider|python|source|curl|cat|for|make|kubectl|scripts/\w+\.sh) ")
# Words that stand for something else; each needs a replacement.
PLACEHOLDER = re.compile(
    r"…|\b[A-Z]{4,}\d?\b(?!_)(?<!END)|/models/|\bmeta-llama/|\bexample\b|[a-z]:50\d\d\d\b(?<!localhost:50051)"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_says_what_it_is(page: Path) -> None:
    """A block without a language would neither be run nor listed."""
    unknown = [b.line for b in blocks(page) if b.language not in (*SHELL, "python", *OTHER)]
    assert unknown == [], "add sh, console or text behind ```"


def test_each_command_is_run_or_listed() -> None:
    """Run: a program that the harness knows, with all its placeholders replaced."""
    values = dict.fromkeys(("target", "draft", "other_draft", "foreign_draft", "root", "bin",
                            "redis", "metrics", "revision"), "replaced")  # fmt: skip
    problems = []
    for command in COMMANDS:
        if plan.reason_not_run(command) is not None:
            continue
        if not PROGRAM.match(command.text):
            problems.append(f"{command}: neither run nor listed in tests/shown/plan.py")
        if command.text.startswith("python - <<"):
            continue
        text = plan.replaced(command, values)
        if left := PLACEHOLDER.findall(re.sub(r"'[^']*'|\"[^\"]*\"", "", text)):
            problems.append(f"{command}: no replacement in tests/shown/plan.py for {left}")
    assert problems == []


def test_a_command_that_is_not_listed_is_found() -> None:
    block = Block(
        "docs/how-to/x.md", 3, "sh", "helm install x  # a chart\noutrider up \\\n  --gamma 3\n"
    )
    assert [(c.line, c.text) for c in block.commands()] == [
        (3, "helm install x"), (4, "outrider up --gamma 3"),
    ]  # fmt: skip
    assert not any(PROGRAM.match(c.text) for c in block.commands() if "helm" in c.text)
    console = Block("docs/how-to/x.md", 3, "console", "$ outrider model\ntarget x\n$ cat f\n{\n")
    assert [(c.text, c.output) for c in console.commands()] == [
        ("outrider model", "target x\n"), ("cat f", "{\n"),
    ]  # fmt: skip


def test_each_entry_of_the_lists_has_a_command() -> None:
    """A reason for a command that no page shows any more is deleted."""
    unused = [
        pattern
        for page, pattern, _ in plan.NOT_RUN
        if not any(page in c.page and re.search(pattern, c.text) for c in COMMANDS)
    ]
    assert unused == []
    pages = {command.page for command in COMMANDS}
    assert [page for page in plan.SUPPOSED if not any(page in name for name in pages)] == []


def test_most_commands_are_run() -> None:
    num_listed = sum(plan.reason_not_run(command) is not None for command in COMMANDS)
    assert len(COMMANDS) - num_listed >= 60, f"{num_listed} of {len(COMMANDS)} are not run"
    assert isinstance(COMMANDS[0], Command)
