"""Each page's commands, run in order as a reader would; a few minutes for all (`make shown`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.quickstart_pair import DRAFT_PATH, TARGET_PATH
from outrider.redis.embedded import RedisServer
from outrider_bench.models.synthetic_pair import noisy_copy
from tests.cli.conftest import VOCAB_SIZE, write_tokenizer
from tests.shown import plan
from tests.shown.blocks import PAGES, ROOT, blocks
from tests.shown.shell import Shell
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WITH_COMMANDS = [page for page in PAGES if any(True for b in blocks(page) for _ in b.commands())]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the placeholders of the pages stand for."""
    models = tmp_path_factory.mktemp("models")
    foreign = make_tiny_model("llama", models / "foreign", vocab_size=VOCAB_SIZE)
    write_tokenizer(foreign, ["the quick brown fox"] * 5)
    with RedisServer() as redis:
        yield {
            "target": str(TARGET_PATH),
            "draft": str(DRAFT_PATH),
            "other_draft": str(noisy_copy(DRAFT_PATH, models / "other", 0.3)),
            "foreign_draft": str(foreign),
            "redis": redis.url,
        }


@pytest.fixture(scope="module")
def system(values: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """One running system, which all pages' clients use unless the page starts its own."""
    shell = Shell(tmp_path_factory.mktemp("system"), values, {})
    try:
        shell.suppose("", plan.SYSTEM)
        yield shell
    finally:
        shell.close()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work(
    page: Path, system: Shell, values: dict[str, str], tmp_path: Path
) -> None:
    shell = Shell(tmp_path, values, system.ports)
    try:
        for name, commands in plan.SUPPOSED.items():
            if page.match(name):
                shell.suppose(name, commands)
        for block in blocks(page):
            for command in block.commands():
                if plan.reason_not_run(command) is None:
                    shell.run(command)
    finally:
        shell.close()
