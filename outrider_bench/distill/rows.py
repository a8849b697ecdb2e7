"""Training data of a distillation: token rows, their file, batches, held-out rows.

A row is a prompt with the target's continuation. Files are JSON lines: `{"token_ids": [...],
"prompt_len": n}`, with an optional `temperature`. Other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """Tokens of a prompt and of the target's continuation. `temperature`: None if unknown."""

    token_ids: tuple[int, ...]
    prompt_len: int
    temperature: float | None = None

    def to_json(self) -> str:
        """One line of a file, with its end."""
        fields = {"token_ids": self.token_ids, "prompt_len": self.prompt_len}
        if self.temperature is not None:
            fields |= {"temperature": self.temperature}
        return json.dumps(fields) + "\n"

    def cut(self, num_tokens: int) -> Row:
        """The row's first tokens, at most this many."""
        return Row(self.token_ids[:num_tokens], self.prompt_len, self.temperature)

    @property
    def has_output(self) -> bool:
        """Whether there is a prompt and a token after it: otherwise nothing can be learnt."""
        return 0 < self.prompt_len < len(self.token_ids)


@dataclass(frozen=True)
class Batch:
    """Rows of equal or padded length: `token_ids` int64 [rows, tokens].

    `mask` bool [rows, tokens]: positions whose next-token distribution is learnt. None: all.
    Padding is on the right, where causal attention does not see it.
    """

    token_ids: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
        """The distributions that the tokens after each prompt were sampled from are learnt."""
        num_tokens = max(len(row.token_ids) for row in rows)
        token_ids = torch.zeros((len(rows), num_tokens), dtype=torch.int64)
        mask = torch.zeros((len(rows), num_tokens), dtype=torch.bool)
        for index, row in enumerate(rows):
            token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
            mask[index, row.prompt_len - 1 : len(row.token_ids) - 1] = True
        return cls(token_ids.to(device), mask.to(device))

    def select(self, logits: Tensor) -> Tensor:
        """Logits [positions, vocab] of the positions that are learnt, of logits for all."""
        return logits.flatten(0, 1) if self.mask is None else logits[self.mask]


def read_records(path: Path, *, max_tokens: int) -> list[Row]:
    """Rows of a file, or of all .jsonl files below a directory, cut to `max_tokens`.

    Left out: rows without output, and a last line that is cut off because its writer was killed.
    Raises ConfigError for any other line that is not a row, and if there are fewer than two rows.
    """
    paths = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    rows: dict[tuple[int, ...], Row] = {}
    for file in paths:
        for number, line in enumerate(_complete_lines(file), 1):
            row = _row(line, f"{file}, line {number}").cut(max_tokens)
            if row.has_output:
                rows[row.token_ids] = row
    if len(rows) < 2:
        raise ConfigError(
            f"{path} has {len(rows)} different rows with output, in {len(paths)} .jsonl files; "
            "at least 2: one is held out"
        )
    return list(rows.values())


def _complete_lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield line


def _row(line: str, place: str) -> Row:
    try:
        fields: dict[str, Any] = json.loads(line)
        temperature = fields.get("temperature")
        return Row(
            tuple(int(i) for i in fields["token_ids"]),
            int(fields["prompt_len"]),
            None if temperature is None else float(temperature),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{place}: not a record: {error!r}; a record has token_ids (a list of ids) and "
            "prompt_len (a number)"
        ) from error


class RowFile:
    """Rows written so far, one file per process. A killed process goes on after its last row."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Row]:
        """Rows written by earlier runs; removes an incomplete last line."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            self._path.write_bytes(complete)
        return [_row(line, str(self._path)) for line in complete.decode().splitlines()]

    def clear(self) -> None:
        """Deletes the file, if there is one."""
        self._path.unlink(missing_ok=True)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds rows to the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(row.to_json() for row in rows)


def shuffled_batch(num_rows: int, size: int, step: int, seed: int) -> list[int]:
    """Indices of the rows of a step: every row once per epoch, in an order that depends on `seed`.

    Depends on the step alone, so a resumed training sees the rows of an uninterrupted one.
    """
    size = min(size, num_rows)
    epoch, index = divmod(step, num_rows // size)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
    return order[index * size : (index + 1) * size].tolist()
