"""Training data of a distillation: token rows, their file, batches, held-out rows.

A row is a prompt with the target's continuation, generated or recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.traffic.record import read_records
from outrider.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """Tokens of a prompt and of the target's continuation. `temperature` 0 is greedy."""

    token_ids: tuple[int, ...]
    prompt_len: int
    temperature: float

    def to_json(self) -> str:
        """One line of a file, with its end."""
        return json.dumps([self.token_ids, self.prompt_len, self.temperature]) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The inverse of `to_json`."""
        token_ids, prompt_len, temperature = json.loads(line)
        return cls(tuple(token_ids), prompt_len, temperature)

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


def read_traffic(
    directory: Path, *, tokenizer: str, max_prompt_tokens: int, max_rows: int
) -> list[Row]:
    """The latest different rows of recorded traffic (`--traffic-dir` of the orchestrator).

    Prompts keep their last tokens. `tokenizer`: fingerprint; records of another one are left out.
    Raises ConfigError for files that are not recorded traffic, and for fewer than two rows.
    """
    rows: dict[tuple[int, ...], Row] = {}
    num_others = 0
    try:
        for record in read_records(directory):
            if record["tokenizer"] != tokenizer:
                num_others += 1
                continue
            prompt = record["prompt_token_ids"][-max_prompt_tokens:]
            token_ids = (*prompt, *record["output_token_ids"])
            row = Row(token_ids, len(prompt), float(record["temperature"]))
            if row.has_output and len(rows) < max_rows:
                rows[token_ids] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--traffic: {directory}: not recorded traffic: {error}") from error
    if len(rows) < 2:
        others = f", and {num_others} of another tokenizer" if num_others else ""
        raise ConfigError(
            f"--traffic: {directory} has {len(rows)} different generations of this target's "
            f"tokenizer{others}; at least 2: one is held out"
        )
    return list(rows.values())


def without_leaks(train: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """The rows to train on that show no part of a held-out output.

    Turns of a conversation are records of their own, each with the earlier ones as its prompt.
    """
    starts = {row.token_ids[: row.prompt_len + 1] for row in held_out}
    lengths = {len(start) for start in starts}
    return [row for row in train if not any(row.token_ids[:length] in starts for length in lengths)]


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
        return [Row.from_json(line) for line in complete.decode().splitlines()]

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
