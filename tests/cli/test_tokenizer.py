"""`outrider convert-tokenizer`: tokenizers that only transformers can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from outrider import tokenizer_files
from outrider.tokenizer import Tokenizer
from tests import vocabularies
from tests.cli.processes import run

TEXTS = ("ab 🇫🇷 Hello  world\n你", "<s> and </s>", " leading", "def f(x):\n    return x")
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "ab"}]


def sentencepiece(directory: Path) -> Path:
    vocabularies.write_sentencepiece(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (directory / "generation_config.json").write_text('{"temperature": 0.6}', "utf-8")
    return directory


def of_the_class(directory: Path) -> Path:
    """No tokenizer_config.json: class and special tokens follow from the model type."""
    directory.mkdir()
    source = vocabularies.MISTRAL_DATA / "tokenizer.model.v1"
    shutil.copy(source, directory / "tokenizer.model")
    (directory / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return directory


def two_files(directory: Path) -> Path:
    directory.mkdir()
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġab": 5}
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", "utf-8")
    vocabularies.write_config(directory, tokenizer_class="GPT2Tokenizer", chat_template=TEMPLATE)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("model", [sentencepiece, of_the_class, two_files])
def test_ids_are_those_of_transformers_before_and_after(
    model: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is read without transformers: ids, text, chat template and end token."""
    assert callable(model)
    source, directory = model(tmp_path / "model"), tmp_path / "new" / "converted"
    before = AutoTokenizer.from_pretrained(source)
    ended = run("convert-tokenizer", str(source), str(directory))
    assert ended.returncode == 0, ended.stderr
    assert str(directory) in ended.stdout
    after = AutoTokenizer.from_pretrained(directory)
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    ours = Tokenizer.load(str(directory))
    assert ours is not None
    texts = TEXTS if model is not two_files else ("ab ab", "<|endoftext|>ab")
    for text in texts:
        ids = before.encode(text)
        assert ours.encode(text) == ids == after.encode(text)
        assert ours.decode(ids) == before.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == before.eos_token_id
    rendered = before.apply_chat_template(MESSAGES, tokenize=False)
    assert ours.render_chat(MESSAGES) == rendered
    assert after.apply_chat_template(MESSAGES, tokenize=False) == rendered
    for name in ("generation_config.json", "config.json"):
        assert (source / name).is_file() == (directory / name).is_file()


def test_failed_conversion_prints_one_line(tmp_path: Path) -> None:
    broken = vocabularies.write_sentencepiece(tmp_path / "broken")
    (broken / "tokenizer.model").write_bytes(b"no vocabulary")
    (tmp_path / "empty").mkdir()
    taken = tmp_path / "file"
    taken.write_text("")
    for source, directory, message in (
        (broken, tmp_path / "out", "cannot be converted"),
        (tmp_path / "empty", tmp_path / "out", "has no tokenizer"),
        (tmp_path / "absent" / "model", tmp_path / "out", "neither a local directory nor"),
        (two_files(tmp_path / "two"), taken, f"{taken}: "),
    ):
        ended = run("convert-tokenizer", str(source), str(directory))
        assert ended.returncode == 2, ended
        line = ended.stderr.splitlines()[-1]  # transformers may have warned before
        assert line.startswith("outrider: "), ended.stderr
        assert message in line
        assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
