"""Texts by task, from the Python standard library of this machine: what a target would write.

A simulated target writes them (`texts` of `outrider.settings.simulation`). Real models get the same
prompts and write what they like.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider.tokenizer import Tokenizer

# Modules with less text are left out, so that a prompt and its output fit.
_MIN_CHARS = 24_000
# Prose of the standard library: the texts of `help()`.
_PROSE = "pydoc_data/topics.py"
# Tokens of a part of a mixed output.
_PART_LEN = 64
# Names that an editing task renames, the most frequent ones of at least this length.
_NUM_RENAMED, _MIN_NAME_CHARS = 2, 4
_NAME = re.compile(r"\b[A-Za-z_]\w+\b")
_COMMENT = re.compile(r"^\s*#.*\n", re.MULTILINE)


@dataclass(frozen=True)
class TaskText:
    """A prompt and its output. `number`: of all texts of all tasks."""

    task: str
    number: int
    prompt_ids: list[int]
    output_ids: list[int]


class TaskTexts:
    """Texts of every task. Prompts differ in their first tokens.

    quoting: repeats a part of the prompt. editing: repeats it with two names changed and without
    comments. code: continues the prompt's module. prose: continues a page of `help()`. mixed: prose
    and quotes of the prompt in turn.
    """

    TASKS = ("quoting", "editing", "mixed", "code", "prose")

    def __init__(self, tokenizer: Tokenizer, prompt_len: int, output_len: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_len, self._output_len = prompt_len, output_len
        root = Path(sysconfig.get_paths()["stdlib"])
        modules = (path.read_text("utf-8", "replace") for path in sorted(root.glob("*.py")))
        self._modules = [text for text in modules if len(text) >= _MIN_CHARS]
        self._prose = re.sub(r"\\n|['\"]", " ", (root / _PROSE).read_text("utf-8", "replace"))

    def of(self, num_per_task: int) -> Iterator[TaskText]:
        """Texts of all tasks, `num_per_task` of each."""
        for number in range(num_per_task * len(self.TASKS)):
            task, index = self.TASKS[number // num_per_task], number % num_per_task
            prompt, output = self._text(task, index)
            head = self._tokenizer.encode(f"# {number}, {task}, number {number} of these texts\n")
            prompt_ids = [*head, *prompt][: len(head) + self._prompt_len]
            yield TaskText(task, number, prompt_ids, output[: self._output_len])

    def _text(self, task: str, index: int) -> tuple[list[int], list[int]]:
        encode, num = self._tokenizer.encode, self._prompt_len
        code = self._modules[index % len(self._modules)]
        begin = (index * 24_000) % (len(self._prose) - 24_000)
        prose = encode(self._prose[begin : begin + 24_000])
        if task == "prose":
            return prose[:num], prose[num:]
        tokens = encode(code[:24_000])
        prompt = tokens[:num]
        if task == "code":
            return prompt, tokens[num:]
        if task == "editing":
            return prompt, encode(edited(self._tokenizer.decode(prompt)))
        quote = prompt[num // 4 :]
        if task == "quoting":
            return prompt, quote
        parts = range(0, len(quote), _PART_LEN)
        both = [(prose[at : at + _PART_LEN], quote[at : at + _PART_LEN]) for at in parts]
        return prompt, [token for pair in both for part in pair for token in part]


def edited(text: str) -> str:
    """The text with its most frequent names changed and without lines of comments."""
    names = Counter(name for name in _NAME.findall(text) if len(name) >= _MIN_NAME_CHARS)
    for name, _ in names.most_common(_NUM_RENAMED):
        text = re.sub(rf"\b{name}\b", f"new_{name}", text)
    return _COMMENT.sub("", text)
