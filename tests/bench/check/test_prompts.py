"""Prompts of a check: built-in ones, files, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.quickstart_pair import TARGET_PATH
from outrider.tokenizer import Tokenizer
from outrider_bench.check.prompts import BUILT_IN, Task, built_in, from_file, random_prompts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(str(TARGET_PATH))
    assert loaded is not None
    return loaded


def test_every_task_has_different_prompts(tokenizer: Tokenizer) -> None:
    assert set(BUILT_IN) == set(Task)
    prompts = built_in(tokenizer, list(Task), chat=False)
    assert len({prompt.token_ids for prompt in prompts}) == len(prompts)
    assert {prompt.task for prompt in prompts} == set(Task)
    chosen = built_in(tokenizer, [Task.code], chat=False)
    assert tokenizer.decode(chosen[0].token_ids) == BUILT_IN[Task.code][0]


def test_chat_puts_prompts_into_the_template(tokenizer: Tokenizer) -> None:
    (ids, *_) = (prompt.token_ids for prompt in built_in(tokenizer, [Task.chat], chat=True))
    rendered = tokenizer.render_chat([{"role": "user", "content": BUILT_IN[Task.chat][0]}])
    assert list(ids) == tokenizer.encode(rendered, add_special_tokens=False)
    assert rendered.startswith("<|user|>")


def test_a_text_file_has_a_prompt_per_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("def one():\n\nclass Two:\n", "utf-8")
    texts = [tokenizer.decode(p.token_ids) for p in from_file(path, tokenizer, chat=False)]
    assert texts == ["def one():", "class Two:"]


def test_a_jsonl_file_has_prompts_texts_and_chats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    entries = [{"prompt": "a", "task": "mine"}, {"text": "b"}, {"messages": messages}]
    path.write_text("\n".join(map(json.dumps, entries)), "utf-8")
    one, two, three = from_file(path, tokenizer, chat=False)
    assert (one.task, two.task) == ("mine", "file")
    rendered = tokenizer.render_chat(messages)
    assert list(three.token_ids) == tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n\n", "has no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2: expected an object"),
        ("bad.jsonl", "[1]", "line 1: expected an object"),
        ("bad.jsonl", "{", "line 1: expected an object"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    name: str, content: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=message):
        from_file(path, tokenizer, chat=False)
    with pytest.raises(ConfigError, match="--prompts"):
        from_file(tmp_path / "none", tokenizer, chat=False)


def test_random_prompts_are_the_same_in_every_run() -> None:
    assert random_prompts(512, 4, seed=1) == random_prompts(512, 4, seed=1)
    assert random_prompts(512, 4, seed=1) != random_prompts(512, 4, seed=2)
