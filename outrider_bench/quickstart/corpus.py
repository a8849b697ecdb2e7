"""Training text: Python sources of this machine, their tokenizer and token windows.

Owns the choice of files and held-out files, the byte-level BPE tokenizer with its chat template,
and the split of documents into token windows.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from outrider.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END)

# The format of `chat_documents`: a docstring is the question, its function the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Tests are repetitive and would be more than half of the text; encodings are tables. _sysconfigdata
# describes the build machine.
_EXCLUDED_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "__pycache__",
}
_HOLD_OUT_ONE_IN = 33
_MAX_CHAT_CHARACTERS = 1500


@dataclass(frozen=True)
class Corpus:
    """Documents by split. The held-out ones (about 3%) are not trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_corpus(root: Path | None = None, *, packages: Sequence[str] = ()) -> Corpus:
    """Reads the `*.py` files of the standard library and of installed packages.

    `root`: the standard library (default: this Python's). Raises ConfigError for a package that is
    not installed, and ValueError if there are too few files.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for folder in (root, *map(_package_folder, packages)):
        for path in _source_files(folder):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules declare another encoding; skip them
            (held_out if _is_held_out(path.relative_to(folder)) else train).append(text)
    if not train or not held_out:
        raise ValueError(f"too few Python files under {root} to train on and to hold out")
    return Corpus(tuple(train), tuple(held_out))


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"--packages: {name!r} is not an installed package with modules")
    return Path(spec.submodule_search_locations[0])


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _EXCLUDED_DIRECTORIES.isdisjoint(parts) and not path.name.startswith("_sysconfigdata"):
            yield path


def _is_held_out(relative_path: Path) -> bool:
    digest = hashlib.sha256(relative_path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "little") % _HOLD_OUT_ONE_IN == 0


def chat_documents(documents: Sequence[str]) -> Iterator[str]:
    """Yields one exchange per short documented function: its docstring, then its source."""
    for text in documents:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # templates and Python 2 fixtures
        lines = text.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            question = ast.get_docstring(node)
            answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if question and len(answer) <= _MAX_CHAT_CHARACTERS:
                yield f"{USER}{question}{END}{ASSISTANT}{answer}{END}"


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `documents`; lossless on any text, no prefix space, no clean-up."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[USER, ASSISTANT, END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> torch.Tensor:
    """All documents as one int64 stream, with an end-of-text token after each."""
    token_ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(documents)):
        token_ids.extend(encoding.ids)
        token_ids.append(tokenizer.eos_token_id)
    return torch.tensor(token_ids, dtype=torch.int64)


def random_windows(
    stream: torch.Tensor, num_rows: int, num_tokens: int, generator: torch.Generator
) -> torch.Tensor:
    """Random windows of the stream: int64 [num_rows, num_tokens]."""
    starts = torch.randint(0, len(stream) - num_tokens + 1, (num_rows, 1), generator=generator)
    return stream[starts + torch.arange(num_tokens)]
