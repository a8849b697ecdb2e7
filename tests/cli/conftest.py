"""Tiny models with a tokenizer, and one running system shared by tests that send requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.cli.processes import Up, up, wait_for_draft
from tests.tiny_models import make_tiny_draft, make_tiny_model

VOCAB_SIZE = 300
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def write_tokenizer(directory: Path, corpus: list[str]) -> None:
    """Writes a byte-level BPE tokenizer; another corpus gives another vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    # Every id of the model has a token; the last one is its end of sequence.
    missing = range(backend.get_vocab_size(), VOCAB_SIZE)
    backend.add_special_tokens([f"<special {number}>" for number in missing])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, "utf-8")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_model(
        "llama", tmp_path_factory.mktemp("cli") / "target", vocab_size=VOCAB_SIZE
    )
    write_tokenizer(directory, ["def main():\n    return 1\n", "the quick brown fox"] * 5)
    return directory


@pytest.fixture(scope="session")
def draft(target: Path) -> Path:
    directory = make_tiny_draft(target, target.parent / "draft")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (directory / name).write_bytes((target / name).read_bytes())
    return directory


@pytest.fixture(scope="session")
def running(target: Path, draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    log_dir = tmp_path_factory.mktemp("logs")
    flags = (
        f"--target={target}",
        f"--draft={draft}",
        f"--log-dir={log_dir}",
        "--metrics",
        "--http-port=0",
    )
    with up(*flags) as started:
        wait_for_draft(started.endpoint)
        yield started
        started.process.terminate()
        started.process.wait(60)


@pytest.fixture(scope="session")
def endpoint(running: Up) -> str:
    return running.endpoint
