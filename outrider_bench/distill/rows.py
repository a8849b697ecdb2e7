"""Training data of a distillation: token rows, their file, batches, held-out rows.

A row is a prompt with the target's continuation, generated or recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.traffic.record import read_records
from outrider.errors import ConfigError
from outrider_bench.distill.distributions import PartialDistributions


@dataclass(frozen=True)
class Row:
    """Tokens of a prompt and of the target's continuation. `temperature` 0 is greedy.

    `top`: the target's most likely tokens at each position of the output, if they were recorded.
    """

    token_ids: tuple[int, ...]
    prompt_len: int
    temperature: float
    top: PartialDistributions | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """One line of a file, with its end."""
        values: list[Any] = [self.token_ids, self.prompt_len, self.temperature]
        if self.top is not None:
            values += [self.top.token_ids.tolist(), self.top.log_probs.tolist()]
        return json.dumps(values) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The inverse of `to_json`."""
        token_ids, prompt_len, temperature, *top = json.loads(line)
        recorded = PartialDistributions.recorded(*top) if top else None
        return cls(tuple(token_ids), prompt_len, temperature, recorded)

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens after the prompt: of positions to learn from."""
        return len(self.token_ids) - self.prompt_len

    @property
    def has_output(self) -> bool:
        """Whether there is a prompt and a token after it: otherwise nothing can be learnt."""
        return 0 < self.prompt_len < len(self.token_ids)


@dataclass(frozen=True)
class Batch:
    """Rows of equal or padded length: `token_ids` int64 [rows, tokens].

    `mask` bool [rows, tokens - first]: positions from `first` on whose next-token distribution is
    learnt. None: all. Padding is on the right, where causal attention does not see it. `target`:
    distributions of the target at these positions; None: not known.
    """

    token_ids: Tensor
    mask: Tensor | None = None
    first: int = 0
    target: PartialDistributions | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
        """The distributions that the tokens after each prompt were sampled from are learnt.

        The last token of a row is left out: nothing is learnt after it.
        """
        first = max(0, min(row.prompt_len for row in rows) - 1)
        num_tokens = max(first + 1, *(len(row.token_ids) - 1 for row in rows))
        token_ids = torch.zeros((len(rows), num_tokens), dtype=torch.int64)
        mask = torch.zeros((len(rows), num_tokens - first), dtype=torch.bool)
        for index, row in enumerate(rows):
            known = row.token_ids[:num_tokens]
            token_ids[index, : len(known)] = torch.tensor(known)
            mask[index, max(0, row.prompt_len - 1 - first) : len(row.token_ids) - 1 - first] = True
        # Selecting all of them by a mask would cost a tenth of a small draft's training.
        return cls(token_ids.to(device), None if mask.all() else mask.to(device), first)

    def logits(self, model: Any) -> Tensor:
        """A model's logits [positions, vocab] at the positions that are learnt, in its precision.

        The head, most of a small model, is computed from the first such position on.
        """
        num_kept = self.token_ids.shape[1] - self.first
        found = model(input_ids=self.token_ids, use_cache=False, logits_to_keep=num_kept).logits
        selected: Tensor = found.flatten(0, 1) if self.mask is None else found[self.mask]
        return selected


def read_traffic(
    directory: Path, *, tokenizer: str, model: str, max_prompt_tokens: int, max_rows: int
) -> list[Row]:
    """The latest different rows of recorded traffic (`--traffic-dir` of the orchestrator).

    Prompts keep their last tokens. `tokenizer`: fingerprint; records of another one are left out.
    `model`: the target's fingerprint; of another model the text is used, its probabilities are not.
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
                rows[token_ids] = replace(row, top=_recorded_top(record, model, row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--traffic: {directory}: not recorded traffic: {error}") from error
    if len(rows) < 2:
        others = f", and {num_others} of another tokenizer" if num_others else ""
        raise ConfigError(
            f"--traffic: {directory} has {len(rows)} different generations of this target's "
            f"tokenizer{others}; at least 2: one is held out"
        )
    return list(rows.values())


def _recorded_top(record: dict[str, Any], model: str, row: Row) -> PartialDistributions | None:
    """The most likely tokens of a record; None if they are not of this model or not complete."""
    if record["model"] != model or len(record["top_token_ids"]) != row.num_output_tokens:
        return None
    return PartialDistributions.recorded(record["top_token_ids"], record["top_logprobs"])


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


# Batches whose rows are sorted by length together: similar lengths need little padding.
_BATCHES_SORTED = 32


def shuffled_batch(lengths: Sequence[int], size: int, step: int, seed: int) -> list[int]:
    """Indices of the rows of a step: every row once per epoch, in an order that depends on `seed`.

    `lengths`: of the rows. Rows of a batch have similar lengths. Depends on the step alone, so a
    resumed training sees the rows of an uninterrupted one.
    """
    size = min(size, len(lengths))
    epoch, index = divmod(step, len(lengths) // size)
    return _epoch(tuple(lengths), size, seed * 7919 + epoch)[index]


@lru_cache(maxsize=2)
def _epoch(lengths: tuple[int, ...], size: int, seed: int) -> list[list[int]]:
    """Batches of an epoch: rows in random order, sorted by length in parts, batches shuffled."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order = order[: len(order) // size * size]
    batches = []
    for start in range(0, len(order), size * _BATCHES_SORTED):
        part = sorted(order[start : start + size * _BATCHES_SORTED], key=lambda row: lengths[row])
        batches += [part[place : place + size] for place in range(0, len(part), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]
