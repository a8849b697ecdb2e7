"""Commands in the documents use existing subcommands and flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider.cli.app import app
from tests.deploy.sources import script
from tests.test_documents import PAGES, ROOT

reference = script("reference")
OUTRIDER: Any = typer.main.get_command(app())
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
SERVICES = {
    f"-m {command.rpartition(' ')[2]} ": reference.fields(kind)
    for _, command, kind in reference.PROGRAMS
}


def commands(page: Path) -> Iterator[str]:
    """Code spans and lines of code blocks, with continued lines joined and comments removed."""
    text = page.read_text("utf-8")
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"\s#\s.*", "", line)
    yield from (" ".join(span.split()) for span in CODE.findall(FENCE.sub("", text)))


def subcommands(command: Any) -> list[str]:
    return command.list_commands(None) if hasattr(command, "list_commands") else []


def problems(line: str) -> Iterator[str]:
    """What is wrong with a command of `outrider` or of a service."""
    for service, entries in SERVICES.items():
        if service in line:
            names = {f"--{entry.name.replace('_', '-')}" for entry in entries}
            names |= {f"--no-{name[2:]}" for name in names} | {"--help", "--version"}
            yield from (flag for flag in FLAG.findall(line) if flag not in names)
    if not line.startswith("outrider "):
        return
    command = OUTRIDER
    words = line.split()[1:]
    while words and words[0] in subcommands(command):
        command = command.get_command(None, words.pop(0))
    if subcommands(command):
        if words and words[0].isalpha():
            yield f"no command {words[0]}"
        return
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    yield from (flag for flag in FLAG.findall(line) if flag not in {*known, "--help"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    found = {line: wrong for line in commands(page) if (wrong := list(problems(line)))}
    assert found == {}


def test_a_wrong_command_is_found() -> None:
    """The check sees a missing subcommand, a missing option, and a missing flag of a service."""
    assert list(problems("outrider bench spede")) == ["no command spede"]
    assert list(problems("outrider generate 'x' --gama 3 --gamma 3")) == ["--gama"]
    assert list(problems("python -m target_service --modle x --port 1")) == ["--modle"]
