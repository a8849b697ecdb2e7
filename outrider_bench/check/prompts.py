"""Prompts to check a pair on: built-in ones by task, the user's file, or random token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from outrider.tokenizer import Tokenizer

_NOTICE = (
    "The station will close for repairs on Monday. Trains from the north stop at Harbour Street "
    "instead; a bus runs between the two every ten minutes. Tickets bought before Monday stay "
    "valid. The lifts at Harbour Street are out of order until Wednesday, so passengers who need "
    "one should change at Old Mill."
)
_MINUTES = (
    "The group met for an hour. Ada reported that the new index halves the time of a search but "
    "doubles the disk it needs. Ben asked whether old entries could be dropped after a year. Most "
    "agreed, with the exception of invoices, which are kept for ten. Ada will write the rule down "
    "and try it on a copy by Friday."
)
_FUNCTION = """\
def total(orders, rate):
    result = 0
    for order in orders:
        if order.is_paid:
            result += order.amount
    return result * rate
"""
_SETTINGS = """\
host = "db.example.net"
port = 5432
pool_size = 4
timeout_s = 30
retries = 2
"""


class Task(StrEnum):
    """Kinds of work; acceptance differs between them."""

    code = "code"
    chat = "chat"
    summary = "summary"
    translation = "translation"
    editing = "editing"
    writing = "writing"


BUILT_IN: Mapping[Task, tuple[str, ...]] = {
    Task.code: (
        "Write a Python function that returns the n-th Fibonacci number without recursion.",
        "Write a Python class for a queue with the methods push, pop and len.",
        "Write a SQL query that returns the ten customers with the most orders of this year.",
        "Write a shell script that renames all .jpeg files in a directory to .jpg.",
    ),
    Task.chat: (
        "What is the difference between a process and a thread?",
        "My tomato plants have yellow leaves. What could be the reason?",
        "How do I politely decline an invitation to a wedding?",
        "Explain to a child why the sky is blue.",
    ),
    Task.summary: (
        f"Summarise this notice in one sentence:\n\n{_NOTICE}",
        f"Summarise these minutes as a list of decisions:\n\n{_MINUTES}",
    ),
    Task.translation: (
        f"Translate to German:\n\n{_NOTICE}",
        f"Translate to Spanish:\n\n{_MINUTES}",
    ),
    Task.editing: (
        f"Repeat this text word for word, but replace Monday with Tuesday:\n\n{_NOTICE}",
        f"Add type hints to this function and change nothing else:\n\n{_FUNCTION}",
        f"Repeat these settings, with pool_size changed to 16:\n\n{_SETTINGS}",
        f"Quote the sentences of this text that mention Ada:\n\n{_MINUTES}",
    ),
    Task.writing: (
        "Write the beginning of a story about a lighthouse keeper who finds a letter.",
        "Write a short poem about the first snow of the year.",
        "Describe a market in a small town on a rainy morning.",
        "Write a diary entry of someone who has just moved to a new country.",
    ),
}
# For models without a tokenizer.
_RANDOM_TASK = "random ids"
_RANDOM_LEN = 16


@dataclass(frozen=True)
class Prompt:
    """A prompt and its task: one of `Task`, or the user's own name for it."""

    task: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Prompts, and whether outputs go on after an EOS token (models without a tokenizer)."""

    prompts: list[Prompt]
    ignores_eos: bool = False


def built_in(tokenizer: Tokenizer, tasks: Sequence[Task], *, chat: bool) -> list[Prompt]:
    """Prompts of these tasks. `chat`: in the model's chat template."""
    return [
        Prompt(task.value, _encoded(tokenizer, text, chat=chat))
        for task in tasks
        for text in BUILT_IN[task]
    ]


def from_file(path: Path, tokenizer: Tokenizer, *, chat: bool) -> list[Prompt]:
    """Prompts of a text file, one per line, or of a .jsonl file.

    A line of JSON has `prompt`, `text` or `messages` (of a chat), and optionally `task`. Raises
    ConfigError.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path}: {error}") from error
    if not lines:
        raise ConfigError(f"--prompts: {path} has no prompts")
    if path.suffix != ".jsonl":
        return [Prompt("file", _encoded(tokenizer, line, chat=chat)) for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(_from_json(json.loads(line), tokenizer, chat=chat))
        except (ValueError, TypeError, KeyError, AttributeError, InvalidRequest) as error:
            raise ConfigError(
                f"--prompts: {path}, line {number}: expected an object with prompt, text or "
                f"messages: {error}"
            ) from error
    return prompts


def _from_json(entry: dict[str, Any], tokenizer: Tokenizer, *, chat: bool) -> Prompt:
    task = str(entry.get("task", "file"))
    if "messages" in entry:
        text = tokenizer.render_chat(entry["messages"])
        return Prompt(task, tuple(tokenizer.encode(text, add_special_tokens=False)))
    text = entry["prompt"] if "prompt" in entry else entry["text"]
    if not isinstance(text, str):
        raise TypeError("the prompt is not a string")
    return Prompt(task, _encoded(tokenizer, text, chat=chat))


def _encoded(tokenizer: Tokenizer, text: str, *, chat: bool) -> tuple[int, ...]:
    if not chat:
        return tuple(tokenizer.encode(text))
    rendered = tokenizer.render_chat([{"role": "user", "content": text}])
    return tuple(tokenizer.encode(rendered, add_special_tokens=False))


def random_prompts(vocab_size: int, num: int, seed: int) -> list[Prompt]:
    """Random token ids, for models without a tokenizer: the same ones in every run."""
    from outrider_bench.measuring.workload import Prompts

    prompts = Prompts(vocab_size, tokenizer=None, seed=seed, length=_RANDOM_LEN)
    return [Prompt(_RANDOM_TASK, tuple(prompts.ids(index))) for index in range(num)]
