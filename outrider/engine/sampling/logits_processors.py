"""Logits processors before temperature: bias, masks, bad words, min_tokens and penalties.

One call handles all generations of a step. Only generations with such parameters are touched, and
penalties touch only the entries of tokens in the context. Order and meaning as in vLLM
(`outrider/sampling/warp.py`). Call it on the device thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from outrider.engine.interface import Ids
from outrider.sampling import warp
from outrider.sampling.bad_words import BannedSequences
from outrider.sampling.params import SamplingParams


class GenerationSampler:
    """Sampling state of one generation: its parameters and what is derived from them.

    `vocab_size` cuts the logits: tokens at or beyond it are never sampled or drafted. Nor are
    `forbidden_ids`, int64 below it; None: no others.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: str,
        forbidden_ids: Ids | None = None,
    ) -> None:
        self.params = params
        self.forbidden_ids = forbidden_ids
        self.prompt_len = prompt_len
        self.vocab_size = vocab_size
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self.stop_ids = np.array(sorted(i for i in stops if i < vocab_size), np.int64)
        self.bias = self._bias_vector(torch.device(device))
        self.banned = BannedSequences(params.bad_words_token_ids, prompt_len)
        self.adjusts = warp.needs_adjustment(params) or bool(params.min_tokens)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the argmax of the raw logits at every position."""
        return self.params.greedy and not self.adjusts

    def _bias_vector(self, device: torch.device) -> torch.Tensor | None:
        """Float32 [vocab]: logit bias, and -inf for tokens that are not allowed; None: no bias."""
        params, size = self.params, self.vocab_size
        if not (params.logit_bias or params.allowed_token_ids):
            return None
        bias = np.zeros(size, np.float32)
        if params.allowed_token_ids:
            bias[:] = -np.inf
            bias[[i for i in params.allowed_token_ids if i < size]] = 0.0
        for token_id, value in params.logit_bias.items():
            if token_id < size:
                bias[token_id] += value
        return torch.from_numpy(bias).to(device)


class PositionSpan(NamedTuple):
    """Rows [start, stop) of one generation; the first row is for `position`.

    `history` holds at least the tokens before the last row's position. `forbidden`: bool
    [rows, vocab or more], tokens that the output's format does not allow; None: none.
    """

    sampler: GenerationSampler
    start: int
    stop: int
    position: int
    history: Ids
    forbidden: Ids | None = None


@dataclass(frozen=True, slots=True)
class _Penalised:
    """Entries of the flattened rows, each with its counts and its generation's penalties: [m]."""

    entries: torch.Tensor
    output_counts: torch.Tensor
    seen: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    repetition_penalty: torch.Tensor


def adjust(logits: torch.Tensor, spans: Sequence[PositionSpan]) -> None:
    """Apply all processors to float32 [n, vocab], contiguous, in place."""
    for span in spans:
        if span.sampler.bias is not None:
            logits[span.start : span.stop] += span.sampler.bias
        if span.forbidden is not None:
            mask = torch.from_numpy(span.forbidden[:, : logits.shape[-1]]).to(logits.device)
            logits[span.start : span.stop].masked_fill_(mask, -torch.inf)
    flat, size = logits.view(-1), logits.shape[-1]
    forbidden = [_forbidden(span, size) for span in spans if span.sampler.params.min_tokens]
    forbidden += [_banned(span, size) for span in spans if span.sampler.banned]
    if forbidden:
        entries = torch.from_numpy(np.concatenate(forbidden)).to(logits.device)
        flat.index_fill_(0, entries, -torch.inf)
    if penalised := [_penalised(span, size) for span in spans if span.sampler.params.penalises]:
        columns = (np.concatenate(parts) for parts in zip(*penalised, strict=True))
        terms = _Penalised(*(torch.from_numpy(column).to(logits.device) for column in columns))
        flat[terms.entries] = warp.penalise(
            flat[terms.entries], terms.output_counts, terms.seen, terms
        )


def _forbidden(span: PositionSpan, size: int) -> Ids:
    """Flat indices of stop tokens in the rows before min_tokens."""
    num_output = span.position - span.sampler.prompt_len
    num_rows = min(max(span.sampler.params.min_tokens - num_output, 0), span.stop - span.start)
    rows = np.arange(span.start, span.start + num_rows)
    return (rows[:, None] * size + span.sampler.stop_ids).reshape(-1)


def _banned(span: PositionSpan, size: int) -> Ids:
    """Flat indices of the tokens that bad words ban in each row."""
    entries = [
        row * size + token_id
        for row in range(span.start, span.stop)
        for token_id in span.sampler.banned.at(span.position + row - span.start, span.history)
        if token_id < size
    ]
    return np.array(entries, np.int64)


def _penalised(span: PositionSpan, size: int) -> tuple[Ids, ...]:
    """Entries, counts, seen and the three penalties of one generation's rows, flattened.

    Every token of the history has an entry in each row; one that the row has not seen yet is
    unchanged.
    """
    params, prompt_len = span.sampler.params, span.sampler.prompt_len
    num_rows = span.stop - span.start
    history = span.history[: span.position + num_rows - 1]
    ids, where = np.unique(history, return_inverse=True)
    counts = np.zeros((num_rows, len(ids)), np.int64)
    seen = np.zeros((num_rows, len(ids)), np.bool_)
    counts[:] = np.bincount(where[prompt_len : span.position], minlength=len(ids))
    seen[:, where[: span.position]] = True
    for row, column in enumerate(where[span.position :].tolist(), 1):
        seen[row:, column] = True
        if span.position + row - 1 >= prompt_len:
            counts[row:, column] += 1
    is_known = ids < size
    columns, counts, seen = ids[is_known], counts[:, is_known], seen[:, is_known]
    entries = np.arange(span.start, span.stop)[:, None] * size + columns.astype(np.int64)
    numbers = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    penalties = (np.full(entries.size, number, np.float32) for number in numbers)
    return entries.reshape(-1), counts.reshape(-1), seen.reshape(-1), *penalties
