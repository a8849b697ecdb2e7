"""Prompts of a distillation: their file, their token ids, and which are held out.

A text file has one prompt per line. A file whose name ends in .jsonl has one JSON value per line:
a string, `{"prompt": text}`, `{"messages": [...]}` (the target's chat template applies) or
`{"token_ids": [...]}`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from outrider.errors import ConfigError, InvalidRequest
from outrider.tokenizer import Tokenizer

Item = TypeVar("Item")

_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 64


def read_prompts(
    path: Path, tokenizer: Tokenizer | None, *, max_tokens: int, flag: str = "--prompts"
) -> list[list[int]]:
    """Token ids of the prompts, each once; longer ones keep their last tokens.

    Raises ConfigError, naming the line and `flag`, for an unreadable file and for fewer than two
    prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag}: {path} cannot be read: {error}") from error
    is_json = path.suffix == ".jsonl"
    unique: dict[tuple[int, ...], None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{flag}: {path}, line {number}"
        try:
            ids = _token_ids(json.loads(line) if is_json else line, tokenizer)
        except InvalidRequest as error:
            raise ConfigError(f"{place}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{place}: not a prompt: {error}; allowed: a string, or an object with prompt, "
                "messages or token_ids"
            ) from error
        if ids:
            unique[tuple(ids[-max_tokens:])] = None
    if len(unique) < 2:
        raise ConfigError(f"{flag}: {path} has {len(unique)} different prompts; at least 2")
    return [list(ids) for ids in unique]


def _token_ids(value: Any, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of one prompt. Raises ValueError, KeyError, TypeError or InvalidRequest."""
    if isinstance(value, dict) and "token_ids" in value:
        return [int(i) for i in value["token_ids"]]
    if tokenizer is None:
        raise ValueError("the target has no tokenizer; give token_ids")
    if isinstance(value, dict) and "messages" in value:
        text = tokenizer.render_chat(value["messages"])
        return tokenizer.encode(text, add_special_tokens=False)
    text = value if isinstance(value, str) else value["prompt"]
    if not isinstance(text, str):
        raise TypeError("the prompt is not a string")
    return tokenizer.encode(text)


def held_out(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Splits the items: to train on, and held out (a tenth, at least 1 and at most 64)."""
    num_held_out = min(_MAX_HELD_OUT, max(1, round(_HELD_OUT_SHARE * len(items))))
    order = random.Random(seed).sample(range(len(items)), len(items))
    chosen = set(order[:num_held_out])
    return (
        [item for index, item in enumerate(items) if index not in chosen],
        [items[index] for index in sorted(chosen)],
    )
